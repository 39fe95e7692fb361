"""The members of a sweep, `python -m train -m`: which are finished, what is known of the others, what Hydra is told.

A launcher (`hydra_plugins`) hands the members that are not finished to a runner, which starts each as
`python -m train` with the member's settings, here (`sweep_local`) or in a Slurm array (`sweep_slurm`). Of each member
`<outputs>/sweeps/<run name>.json` tells its settings, where it runs or ran, and how that ended.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from extract.command import EXIT_BAD_INPUT, compose, experiment_of
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.publish import publish
from train.config import TrainSettings
from train.crosscoder import intact_trained_with
from train.ending import EXIT_FAILED
from train.meeting import Place
from train.preflight import check_store
from train.runs import result_settings, run_folder, selected_pair
from train.stops import EXIT_STOPPED

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One command line of a sweep; how it `ended`, in words, once it has; `job` and `log_file` where Slurm runs it."""

    overrides: list[str]
    settings: TrainSettings
    folder: Path
    group: str
    ended: str | None = None
    job: str | None = None
    log_file: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def command(self) -> list[str]:
        """What trains this member alone."""
        return [sys.executable, "-m", "train", *self.overrides]

    @property
    def record_file(self) -> Path:
        return Path(self.settings.outputs) / "sweeps" / f"{self.name}.json"

    def record(self) -> None:
        """Write down what is known."""
        values = asdict(self) | {"folder": str(self.folder), "settings": result_settings(self.settings)}
        publish(self.record_file, json.dumps(values, indent=1).encode())

    @classmethod
    def read(cls, record: Path) -> Member:
        """The member that `record` was written for."""
        values = json.loads(record.read_bytes())
        settings = compose(TrainSettings, values["overrides"])
        return cls(**{**values, "settings": settings, "folder": Path(values["folder"])})

    def recorded(self) -> dict[str, Any]:
        """What an earlier sweep wrote down; nothing where none did."""
        return json.loads(self.record_file.read_bytes()) if self.record_file.exists() else {}

    def ending(self) -> str:
        """How it ended, with the command that runs it alone."""
        where = f", see {self.log_file}" if self.log_file else ""
        return f"{self.name}: {self.ended}{where}\n    {shlex.join(['python', *self.command[1:]])}"


class Runner(Protocol):
    """How members are run."""

    def __call__(self, members: list[Member]) -> bool:
        """Run `members`, recording how each ended; whether it was asked to stop before all had."""


@dataclass
class Sweep:
    """One `python -m train -m`, whose members Hydra's sweeper hands over all at once or, in a search, some at a time.

    Of a search it is known what `failed` so far, by folders, and whether any member `has_value` to go by.
    """

    config: DictConfig
    failed: dict[Path, Member] = field(default_factory=dict)
    has_value: bool = False

    def run(self, job_overrides: Sequence[Sequence[str]], number: int, runner: Runner) -> list[JobReturn]:
        """Run those members that are not finished, of which `number` is the first's; what Hydra's sweeper is told of
        every one, `objective` among it.

        Exits with EXIT_BAD_INPUT and one line for a sweep that cannot be, with EXIT_STOPPED when asked to stop, and
        with EXIT_FAILED and a list of the members that are not finished. A search goes on instead, and so ends only
        where it has nothing to choose by: at its end, or once a member ends with EXIT_BAD_INPUT.
        """
        logging.basicConfig(format="%(message)s")
        logging.getLogger("train").setLevel(logging.INFO)
        try:
            members = members_of(self.config, job_overrides)
            runs = list({member.folder: member for member in members}.values())
            missing = [member for member in runs if not is_finished(member.settings, member.folder)]
            if is_search(self.config):
                for member in missing:
                    check_store(member.settings)
            log.info("%s: %d of %d members to run", runs[0].group, len(missing), len(runs))
            stopped = bool(missing) and runner(missing)
        except BadInput as error:
            _exit(EXIT_BAD_INPUT, f"error: {error}")
        failed = {member.folder: member for member in missing if not is_finished(member.settings, member.folder)}
        if stopped:
            _exit(EXIT_STOPPED, f"Stopped with {len(failed)} of {len(runs)} members to do; the same command continues.")
        if is_search(self.config):
            return self._searched(members, failed, number + len(members))
        if failed:
            _exit(EXIT_FAILED, summary(runs, list(failed.values())))
        log.info("All members are finished; `python -m analysis.sweep` compares the runs of the study")
        return [_returned(member, False) for member in members]

    def _searched(self, members: list[Member], failed: dict[Path, Member], num_tried: int) -> list[JobReturn]:
        """What a search is told of members, of which some `failed`, once `num_tried` members were tried in all."""
        self.failed |= failed
        runs = {member.folder: member for member in members}
        told = {folder: _returned(member, folder in failed) for folder, member in runs.items()}
        done = [each for each in told.values() if each.status == JobStatus.COMPLETED]
        self.has_value |= any(each.return_value is not None for each in done)
        is_input = any(member.ended == status_text(EXIT_BAD_INPUT) for member in failed.values())
        is_last = num_tried >= self.config.hydra.sweeper.get("n_trials", math.inf)
        if not self.has_value and (is_input or is_last):
            _exit(EXIT_BAD_INPUT if is_input else EXIT_FAILED, without_value(list(self.failed.values()), num_tried))
        return [told[member.folder] for member in members]


def is_search(config: DictConfig) -> bool:
    """Whether Hydra's sweeper chooses settings by what members return, rather than running all."""
    return bool(config.hydra.runtime.choices["hydra/sweeper"] != "basic")


def summary(members: list[Member], failed: list[Member]) -> str:
    """Which members are not finished, and what to do."""
    start = f"error: {len(failed)} of {len(members)} members are not finished; the same command runs them again"
    return "\n".join([f"{start}, or one alone:", *(member.ending() for member in failed)])


def without_value(failed: list[Member], num_tried: int) -> str:
    """Why a search has found nothing, and what to do."""
    start = f"error: {num_tried} trials gave this search nothing to choose by."
    if not failed:
        return f"{start} None has a variance explained of held-out tokens. Is data.heldout_fraction=0?"
    start += " The errors of those that failed say why; the same command tries them again, or one alone:"
    return "\n".join([start, *(member.ending() for member in failed)])


def _exit(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def _returned(member: Member, has_failed: bool) -> JobReturn:
    if has_failed:
        error = CompactHydraException(f"{member.name}: {member.ended}")
        return JobReturn(overrides=member.overrides, status=JobStatus.FAILED, _return_value=error)
    found = objective(member.folder)
    log.info("%s explains %s of the variance of held-out tokens", member.name, "?" if found is None else f"{found:.4f}")
    return JobReturn(overrides=member.overrides, status=JobStatus.COMPLETED, _return_value=found)


def members_of(config: DictConfig, job_overrides: Sequence[Sequence[str]]) -> list[Member]:
    """The members of a sweep; one run is the same member, each time that a search chooses it. BadInput under torchrun,
    and where one run would be trained twice otherwise.
    """
    if Place.of(os.environ).launched:
        raise BadInput(
            "A sweep starts the ranks of its members itself. Run `python -m train -m ...` without torchrun or srun, "
            "and say hydra.launcher.ranks=8 (here), or hydra/launcher=slurm."
        )
    sweep = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = [override.get_key_element() for override in sweep if override.is_sweep_override()]
    swept += [name for name in config.hydra.sweeper.get("params") or {} if name not in swept]
    members = [_member(list(overrides), swept) for overrides in job_overrides]
    numbers = dict[Path, int]()
    for number, member in enumerate(members):
        other = numbers.setdefault(member.folder, number)
        if other != number and not is_search(config):
            raise BadInput(_one_run(member.folder, job_overrides[other], job_overrides[number]))
        members[number] = members[other]
    return members


def _one_run(folder: Path, one: Sequence[str], other: Sequence[str]) -> str:
    """What is wrong with two members of one folder."""
    apart = [" ".join(o for o in line if o not in against) for line, against in ((one, other), (other, one))]
    which = f": {apart[0]} and {apart[1]}" if any(apart) else ""
    return (
        f"Two members of this sweep are one run, {folder}{which}. Sweep over settings that change the result, each "
        f"value once."
    )


def _member(overrides: list[str], swept: list[str]) -> Member:
    settings = compose(TrainSettings, overrides)
    folder = run_folder(settings, experiment_of(settings))
    if settings.tracking.group is not None:
        return Member(overrides, settings, folder, settings.tracking.group)
    group = group_of(overrides, swept, settings.study)
    return Member([*overrides, f"tracking.group={group}"], settings, folder, group)


def group_of(overrides: list[str], swept: list[str], study: str) -> str:
    """The W&B group of a sweep without one of its own: "demo/base_simpo over crosscoder.k and hookpoint"."""
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("experiment=")]
    start = study if "experiment" in swept else chosen[0]
    return f"{start} over {' and '.join(swept)}" if swept else start


def is_finished(settings: TrainSettings, folder: Path) -> bool:
    """Whether the crosscoder of a run is there, intact, and of these settings and data; the data are not opened, and
    where there are no manifests of a store on this machine, as with data=online, they are taken to be the same.
    """
    try:
        trained_with = intact_trained_with(folder / "crosscoder")
    except BadInput:
        return False
    members = settings.pairs[selected_pair(settings)]
    wanted = {**result_settings(settings), "models": members}
    places = [settings.place(member) for member in members]
    stores = [settings.tokens_folder, *(settings.activations_folder(place.model, place.hookpoint) for place in places)]
    if settings.data.mode == "stored" and all((store / "manifest.json").exists() for store in stores):
        wanted["data"] = [Manifest.read(store).content_sha256() for store in stores]
    return not trained_with or all(trained_with.get(name) == value for name, value in wanted.items())


def objective(folder: Path) -> float | None:
    """What a search maximises: the variance explained of held-out tokens, averaged over models, as last measured.

    None for a run that has measured none.
    """
    path, last = folder / "metrics.jsonl", list[float | None]()
    for line in path.read_text().splitlines() if path.exists() else []:
        values = [value for name, value in json.loads(line).items() if name.startswith("val/variance_explained/")]
        last = values or last
    finite = [value for value in last if value is not None]
    return sum(finite) / len(finite) if last and len(finite) == len(last) else None


def status_text(status: int) -> str:
    """How a process with this status, as `subprocess` has it, ended."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return {0: "done", EXIT_STOPPED: "stopped and saved"}.get(status, f"failed with status {status}")
