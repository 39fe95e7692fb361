"""The members of a sweep as elements of a Slurm array, submitted through submitit.

An element is `slurm/train.sh` with the settings of its member, and so is requeued and bounded as a single training is:
submitit's process of an element becomes that script, and handles none of its signals. What submitit pickles is that
command alone. Members whose jobs of an earlier command still wait or run are not submitted again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract.command import compose
from extract.errors import BadInput
from train.preflight import PreflightSettings
from train.preflight import main as preflight
from train.shared_reader import data_key
from train.sweep import Member, status_text
from train.sweep_local import check_sharing

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LOOK_S = 5.0  # seconds between looks at the queue
# Slurm's words for jobs that do not go on; a requeued one is PENDING again, a preempted one where it is not requeued.
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
OVER |= {"PREEMPTED", "REVOKED"}
FORGOTTEN = "FORGOTTEN"  # our word for one that Slurm no longer lists, minutes after its end
# Why jobs wait for ever, and what to do.
NEVER = {
    "PartitionTimeLimit": ": it will never start; scancel it, and give hydra.launcher.time_min (minutes)",
    "PartitionNodeLimit": ": it will never start; scancel it, and give fewer hydra.launcher.nodes",
}
# What overrides an option in the submitted script, so that a launcher's setting would not count.
VARIABLES = {
    "gpus_per_node": "SBATCH_GPUS_PER_NODE",
    "time_min": "SBATCH_TIMELIMIT",
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
}
DAY_MIN = 24 * 60


@dataclass
class SlurmOptions:
    """What every member asks of Slurm; None leaves it to SBATCH_* variables, slurm/site.sh and the cluster's defaults.

    `sbatch` holds further options of sbatch, without dashes. `wait` tells whether the command ends when members have.
    """

    nodes: int = 1
    ranks_per_node: int | None = None
    gpus_per_node: int | None = None
    time_min: int | None = None
    partition: str | None = None
    account: str | None = None
    gpu: str = "auto"
    at_once: int = 256
    sbatch: dict[str, Any] = field(default_factory=dict)
    wait: bool = True


class SlurmRunner:
    """Submits members and waits for them."""

    def __init__(self, options: SlurmOptions):
        self._options = options

    def __call__(self, members: list[Member]) -> bool:
        """Exits with 0 instead where it is not to wait. BadInput where there is no Slurm, and where it refuses."""
        if shutil.which("sbatch") is None:
            raise BadInput("hydra/launcher=slurm needs Slurm's sbatch. Start the sweep on a host that submits jobs.")
        if importlib.util.find_spec("submitit") is None:
            raise BadInput("hydra/launcher=slurm needs submitit: pip install -e '.[slurm]'.")
        new = [member for member in members if not goes_on(member)]
        for member in new:
            look_first(member, self._options)
            member.record()  # what `sweep_members` reads
        if new:
            submit(new, self._options)
        jobs = ",".join(dict.fromkeys((member.job or "").partition("_")[0] for member in members))
        if not self._options.wait:
            log.info("Not waiting (squeue --jobs=%s): the same command tells later what is missing", jobs)
            sys.exit(0)
        try:
            wait_for(members)
        except KeyboardInterrupt:
            log.info("The jobs go on, and the same command waits for them again. To end them: scancel %s", jobs)
            raise
        return False


def goes_on(member: Member) -> bool:
    """Whether an earlier command submitted this member, and its job still waits or runs."""
    found = member.recorded()
    job = found.get("job")
    if job is None or states([job]).get(job, Job(FORGOTTEN)).is_over:
        return False
    member.job, member.log_file = job, found["log_file"]
    log.info("%s: job %s of an earlier command goes on, %s", member.name, job, member.log_file)
    return True


def look_first(member: Member, options: SlurmOptions) -> None:
    """BadInput for a member that could not work: no store, too little memory or time (`train.preflight`)."""
    ranks = options.ranks_per_node or options.gpus_per_node or 1
    asked = [f"gpus={options.nodes * ranks}", f"gpus_per_node={ranks}", f"gpu={options.gpu}"]
    if member.settings.sweep.share_reader:
        asked[0] = "gpus=1"
    elif options.nodes * ranks > 1 and not has_engine(member.overrides):
        asked.append("engine=latent")  # as train.sh does
    if options.time_min:
        asked.append(f"walltime={options.time_min}")
    preflight(compose(PreflightSettings, [*member.overrides, *asked]))


def has_engine(overrides: list[str]) -> bool:
    return any(override.startswith(("engine=", "engine.name=")) for override in overrides)


def submit(members: list[Member], options: SlurmOptions) -> None:
    """One array of all members; their jobs and log files are recorded. BadInput where sbatch refuses."""
    import submitit  # here alone: sweeps without Slurm do without it

    outputs = Path(members[0].settings.outputs).resolve()
    (outputs / "logs").mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(outputs / "sweeps" / "submitit", python=f"exec {shlex.quote(sys.executable)}")
    elements = elements_of(members, options)
    commands = [command_of(element) for element in elements]
    pattern = "sweep-%A_%a.log" if len(elements) > 1 else "sweep-%j.log"
    try:
        with submission_environment(options):
            executor.update_parameters(**parameters(options, outputs / "logs" / pattern))
            jobs = executor.map_array(os.execvp, ["bash"] * len(commands), commands)
    except submitit.core.utils.FailedJobError as error:
        raise BadInput(
            f"Slurm refused the sweep: {' '.join(str(error).split())}. Mend hydra.launcher.partition, account, "
            f"time_min and the like, SBATCH_* variables, or slurm/site.sh."
        ) from error
    for job, element in zip(jobs, elements, strict=True):
        for member in element:
            member.job, member.log_file = job.job_id, str(outputs / "logs" / f"sweep-{job.job_id}.log")
            member.record()
            log.info("%s: job %s, %s", member.name, member.job, member.log_file)


def elements_of(members: list[Member], options: SlurmOptions) -> list[list[Member]]:
    """What each element of the array runs: a member; with sweep.share_reader, as many as a node has GPUs, those of the
    same data together.
    """
    if not any(member.settings.sweep.share_reader for member in members):
        return [[member] for member in members]
    check_sharing(options.nodes * (options.ranks_per_node or 1), "hydra.launcher.nodes and ranks_per_node")
    size = options.gpus_per_node or len(members)
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(data_key(member.settings), []).append(member)
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]


def command_of(element: list[Member]) -> list[str]:
    """What an element of the array becomes."""
    if element[0].settings.sweep.share_reader:
        return ["bash", str(ROOT / "slurm" / "sweep_members.sh"), *(str(m.record_file.resolve()) for m in element)]
    return ["bash", str(ROOT / "slurm" / "train.sh"), *element[0].overrides]


def parameters(options: SlurmOptions, log_file: Path) -> dict[str, Any]:
    """What submitit writes into the script that it submits; the batch shell alone is signalled before the end."""
    own = {"signal": "B:USR1@120", "requeue": True, "output": str(log_file)}
    chosen = {
        "ntasks_per_node": options.ranks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "partition": options.partition,
        "account": options.account,
    }
    return {
        "job_name": "sweep",
        "nodes": options.nodes,
        "time": options.time_min or DAY_MIN,
        "array_parallelism": options.at_once,
        "use_srun": False,
        "wckey": None,  # submitit's own, which some clusters refuse
        "stderr_to_stdout": True,
        "setup": ["export CROSSDIFF_BATCH=1"],  # this script may requeue its job: it is what the job is for
        "additional_parameters": own | options.sbatch,
        **{name: value for name, value in chosen.items() if value is not None},
    }


@contextmanager
def submission_environment(options: SlurmOptions) -> Iterator[None]:
    """The SBATCH_* variables of the site, but those that would override what the launcher was given."""
    site = os.environ.get("CROSSDIFF_SITE", str(ROOT / "slurm" / "site.sh"))
    show = ["bash", "-c", '[ ! -r "$1" ] || . "$1" >&2; env -0', "bash", site]
    shown = subprocess.run(show, stdout=subprocess.PIPE, text=True, check=True).stdout
    variables = dict(entry.partition("=")[::2] for entry in shown.split("\0") if entry.startswith("SBATCH_"))
    overridden = {variable for name, variable in VARIABLES.items() if getattr(options, name) is not None}
    before = dict(os.environ)
    os.environ.update(variables)
    for variable in overridden & os.environ.keys():
        del os.environ[variable]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait_for(members: list[Member]) -> None:
    """Returns when Slurm runs none of them any more; how each ended is recorded when it does."""
    going, told = list(members), dict[str, Job]()
    while going:
        found = states([member.job for member in going if member.job])
        for member in list(going):
            job = found.get(member.job or "", Job(FORGOTTEN))
            if job != told.get(member.name):
                log.info("%s: job %s is %s", member.name, member.job, job)
                told[member.name] = job
            if job.is_over:
                member.ended = str(job)
                member.record()
                going.remove(member)
        time.sleep(LOOK_S if going else 0)


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job: its state, the exit status as `subprocess` has it, and why it waits."""

    state: str
    status: int = 0
    reason: str = "None"

    @property
    def is_over(self) -> bool:
        return self.state in {*OVER, FORGOTTEN}

    def __str__(self) -> str:
        if self.state == "FAILED":
            return status_text(self.status)
        if self.state == FORGOTTEN:
            return "ended some time ago (Slurm has forgotten the job)"
        waits = f" ({self.reason})" if self.state == "PENDING" and self.reason != "None" else ""
        return self.state + waits + NEVER.get(self.reason, "")


def states(jobs: list[str]) -> dict[str, Job]:
    """What Slurm says of each of these jobs, of an array's element "12_3" for one, that it still lists.

    Where it does not answer it is asked again.
    """
    columns = "JobArrayID:.60,State:.30,exit_code:.30,Reason:.100"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={columns}"]
    while True:
        shown = subprocess.run(command, capture_output=True, text=True)
        if shown.returncode == 0 or "Invalid job id" in shown.stderr:
            rows = [line.split(maxsplit=3) for line in shown.stdout.splitlines() if line.strip()]
            return {name: Job(state, os.waitstatus_to_exitcode(int(code)), why) for name, state, code, why in rows}
        log.warning("Slurm does not answer: %s", shown.stderr.strip())
        time.sleep(LOOK_S)
