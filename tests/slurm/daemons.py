"""The daemons of a private Slurm: started in the foreground, each in turn when what it needs answers."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.files import ACCOUNT, Plan
from tests.slurm.hosts import Host

LOOK_S = 0.1
START_S = 180.0  # within which every daemon answers, on a busy machine; one second on a quiet one
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "nsenter", "unshare", "ip"]
ACCOUNTING_PROGRAMS = ["slurmdbd", "mariadbd", "mariadb-install-db", "mariadb"]
PACKAGES = "slurm-wlm munge slurmdbd mariadb-server iproute2"
DATABASE_OPTIONS = [
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=32M",
    "--innodb-lock-wait-timeout=900",
    "--innodb-flush-log-at-trx-commit=0",
]
GRANT = """create database slurm; create user slurm@localhost identified by 'slurm';
grant all on slurm.* to slurm@localhost;"""


class CannotStart(Exception):
    """Why there is no Slurm."""


def check() -> None:
    """CannotStart where what a private Slurm needs is not on this machine."""
    if os.geteuid() != 0:
        raise CannotStart("a private Slurm needs root")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS + ACCOUNTING_PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise CannotStart(f"{', '.join(missing)} missing: apt-get install {PACKAGES}")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as trial:
            if len(found) < number and trial.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


class Daemons:
    """What runs for a cluster of `plan`, in `environment`."""

    def __init__(self, plan: Plan, environment: dict[str, str]):
        self.plan, self.environment = plan, environment
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """CannotStart, with the ends of their logs, if they do not come up."""
        folder, controller = self.plan.folder, self.plan.hosts[0]
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed")]
        self._run(controller, "munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *files)
        self._until("munged", lambda: (folder / "munge.sock").exists())
        if self.plan.accounting:
            self._start_accounting(controller)
        self._run(controller, "slurmctld", "-D")
        for host in self.plan.hosts[1:]:
            self._run(host, "slurmd", "-D", "-N", host.name)
        self._until("slurmd", lambda: self._num_idle() == len(self.plan.hosts) - 1)

    def run(self, host: Host, *command: str) -> str | None:
        """What a command writes to standard output; None if it fails."""
        try:
            done = subprocess.run(
                host.command(list(command), self.plan.folder),
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=START_S,
            )
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None

    def _start_accounting(self, controller: Host) -> None:
        folder, sock = self.plan.folder, f"--socket={self.plan.folder}/mysql.sock"
        data, own = f"--datadir={folder}/mysql", ["--no-defaults", "--user=root"]
        self.run(controller, "mariadb-install-db", *own, data, "--auth-root-authentication-method=normal")
        address = [f"--port={self.plan.ports[2]}", "--bind-address=127.0.0.1"]
        self._run(controller, "mariadbd", *own, data, sock, *address, *DATABASE_OPTIONS)
        query = ["mariadb", "--no-defaults", sock, "--user=root", "--execute"]
        self._until("mariadbd", lambda: self.run(controller, *query, GRANT) is not None)
        self._run(controller, "slurmdbd", "-D")
        manage = ["sacctmgr", "--immediate"]
        self._until("slurmdbd", lambda: self.run(controller, *manage, "add", "cluster", "tests") is not None)
        self.run(controller, *manage, "add", "account", ACCOUNT)
        self.run(controller, *manage, "add", "user", "root", f"account={ACCOUNT}")

    def _run(self, host: Host, name: str, *arguments: str) -> None:
        with (self.plan.folder / "log" / f"{name}.{host.name}.out").open("wb") as out:
            self.running.append(
                subprocess.Popen(
                    host.command([name, *arguments], self.plan.folder),
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _num_idle(self) -> int:
        partition = ["--partition=main", "--states=idle"]
        names = self.run(self.plan.hosts[0], "sinfo", "--noheader", "--Node", *partition, "--format=%N")
        return len((names or "").split())

    def _until(self, name: str, ready: Callable[[], bool]) -> None:
        end_at = time.monotonic() + START_S
        while not ready():
            dead = [process.args for process in self.running if process.poll() is not None]
            if dead or time.monotonic() > end_at:
                raise CannotStart(f"{name} did not come up ({dead or 'no answer'}):\n{self._logs()}")
            time.sleep(LOOK_S)

    def _logs(self) -> str:
        return "\n".join(f"== {path.name}\n{_end_of(path)}" for path in sorted((self.plan.folder / "log").iterdir()))


def _end_of(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-8:])
