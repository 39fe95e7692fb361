"""A real Slurm of its own for tests: submit, wait, read logs, take nodes away.

    with Cluster.up() as cluster:
        job = cluster.sbatch("slurm/tokens.sh", EXPERIMENT="demo")
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)

All its files lie in one folder under the temporary folder, all its processes carry that folder in their environment,
and `guard.py` ends them when the block is left or the test dies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.slurm import guard
from tests.slurm.daemons import Daemons, check, free_ports
from tests.slurm.files import Plan
from tests.slurm.hosts import Host, Network, this_machine

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.2
NOT_INHERITED = re.compile(
    "SLURM_|SBATCH_|SRUN_|SALLOC_|MASTER_|RANK$|WORLD_SIZE$|LOCAL_|WANDB_|EXPERIMENT$|PYTHONDONTWRITE"
)
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
OVER |= {"PREEMPTED", "REVOKED"}


@dataclass
class Cluster:
    """A running Slurm; `environment` is that of a user who has logged in."""

    plan: Plan
    environment: dict[str, str]
    network: Network | None

    @classmethod
    @contextmanager
    def up(
        cls, num_nodes: int = 2, accounting: bool = False, namespaces: bool = False, lost_after_s: int = 60
    ) -> Iterator[Cluster]:
        """A cluster of `num_nodes` nodes with two GPUs each that nobody has. With `accounting` sacct answers, and the
        user has the account `lab`; with `namespaces` every node is a host of its own.

        Raises CannotStart with the reason where there can be none.
        """
        check()
        with guarded_folder() as folder:
            environment = user_environment(folder)
            network = Network.up(folder, num_nodes, environment) if namespaces else None
            hosts = network.hosts if network else this_machine(num_nodes)
            plan = Plan(folder, hosts, free_ports(3 + num_nodes), accounting, lost_after_s)
            plan.write()
            Daemons(plan, environment).start()
            yield cls(plan, environment, network)

    @property
    def login(self) -> Host:
        """Where users are."""
        return self.plan.hosts[0]

    def run(
        self, *command: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command of a user, with more variables if need be; standard error is in its output."""
        return subprocess.run(
            self.login.command(list(command), cwd),
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def must(self, *command: str, cwd: Path = ROOT, **environment: str) -> str:
        """The output of a command that succeeds."""
        done = self.run(*command, cwd=cwd, **environment)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout.strip()

    def sbatch(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
        """Submit what follows `sbatch` on a command line; the job's id."""
        return self.must("sbatch", "--parsable", *arguments, cwd=cwd, **environment).splitlines()[-1].split(";")[0]

    def shown(self, job: str) -> list[dict[str, str]]:
        """What Slurm knows of a job, for every task of an array."""
        text = self.must("scontrol", "show", "job", job, "--oneliner")
        return [dict(re.findall(r"(\w[\w:/-]*)=(\S*)", line)) for line in text.splitlines() if line]

    def state(self, job: str) -> str:
        """The state of a job; of an array that which all tasks have, or all of them, joined by commas."""
        return ",".join(sorted({task["JobState"] for task in self.shown(job)}))

    def wait(self, *jobs: str, timeout: float = 600) -> str:
        """The state in which the jobs end, joined as by `state`."""
        end_at = time.monotonic() + timeout
        while True:
            states = {state for job in jobs for state in self.state(job).split(",")}
            if states <= OVER:
                return ",".join(sorted(states))
            assert time.monotonic() < end_at, f"{jobs} {states} after {timeout} s\n{self.logs(*jobs)}"
            time.sleep(LOOK_S)

    def log_files(self, job: str) -> list[Path]:
        """Where a job, or each task of an array, writes."""
        files = {Path(out) for task in self.shown(job) for out in (task.get("StdOut"), task.get("StdErr")) if out}
        return sorted(files)

    def log(self, job: str) -> str:
        """What a job has written, or the tasks of an array, one after the other."""
        return "\n".join(path.read_text(errors="replace") for path in self.log_files(job) if path.exists())

    def cancel_all(self) -> None:
        """Leave no job."""
        self.must("scancel", "--user=root")
        while self.must("squeue", "--noheader"):
            time.sleep(LOOK_S)

    def logs(self, *jobs: str) -> str:
        return "\n".join(f"== {job}\n{self.log(job)}" for job in jobs)

    def last_lines(self, job: str, number: int = 2) -> str:
        """The last lines that a job wrote: what a user sees first."""
        return "\n".join(self.log(job).rstrip().splitlines()[-number:])


def user_environment(folder: Path) -> dict[str, str]:
    """That of this process without what an outer job or launcher has set, with the Python that runs the tests."""
    inherited = {name: value for name, value in os.environ.items() if not NOT_INHERITED.match(name)}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    own = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return inherited | own


@contextmanager
def guarded_folder() -> Iterator[Path]:
    """A folder for a cluster. After the block, or when this process is killed, nothing of the cluster is left."""
    folder = tempfile.mkdtemp(prefix="slurm-")
    process = subprocess.Popen([sys.executable, guard.__file__, folder], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield Path(folder)
    finally:
        process.communicate()
