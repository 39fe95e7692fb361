"""Weights & Biases beside a command: a process of its own that mirrors a `metrics.jsonl`, so that nothing that W&B does
or fails to do reaches the command.

The command starts it, tells it results and how it ended, and waits for it at the end, for a limited time. What W&B has
been told is always a part of metrics.jsonl: a command that continues starts another process, which goes on after the
last step that W&B has. `extract.mirroring` is what runs in the process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from extract.errors import BadInput
from extract.manifest import provenance
from extract.metrics_file import Values, plain
from extract.publish import publish

log = logging.getLogger(__name__)

ONLINE, OFFLINE, DISABLED = "online", "offline", "disabled"
# W&B's own words for the modes, as WANDB_MODE may have them.
MODES = {ONLINE: ONLINE, "run": ONLINE, OFFLINE: OFFLINE, "dryrun": OFFLINE, DISABLED: DISABLED}
# Where W&B notes which process of its own to use, which may be that of another program, or of a run that failed.
SERVICE = "WANDB_SERVICE"
# Statuses at the end of a command: it failed, or it was stopped and will be continued.
FAILED, STOPPED = 1, 75
# Seconds that a command which failed or was stopped waits for W&B, at most, and that its process gets beyond a limit.
HURRY_S, GRACE_S = 20.0, 5.0
# What Slurm says about a job, by what it is called in the configuration of a run.
SLURM = {
    "job_id": "SLURM_JOB_ID",
    "job_name": "SLURM_JOB_NAME",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "cluster": "SLURM_CLUSTER_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "num_nodes": "SLURM_JOB_NUM_NODES",
    "num_tasks": "SLURM_NTASKS",
    "restart_count": "SLURM_RESTART_COUNT",
}


@dataclass
class TrackingConfig:
    """Weights & Biases, besides metrics.jsonl."""

    # online, offline (files for `wandb sync`, no account needed) or disabled; null = as WANDB_MODE says, else offline.
    mode: str | None = None
    # W&B project.
    project: str = "crossdiff"
    # W&B user or team; null = the account's default.
    entity: str | None = None
    # W&B group of the runs; null = the study.
    group: str | None = None
    # Whether crosscoders and results of the analysis are uploaded as artifacts.
    artifacts: bool = True
    # Files of artifacts that are larger, in 10^9 bytes, are named by their path instead of uploaded.
    max_artifact_gb: float = 1.0
    # Seconds that W&B gets to start; then the run is tracked offline.
    start_timeout_s: float = 60.0
    # Seconds that a finished command waits for its uploads; what is missing then is on disk for `wandb sync`.
    end_timeout_s: float = 120.0

    def check(self) -> None:
        """Checks that concern this section alone."""
        if self.mode not in (None, ONLINE, OFFLINE, DISABLED):
            raise BadInput(f"tracking.mode={self.mode} is not one of {ONLINE}, {OFFLINE}, {DISABLED}.")
        for name in ("start_timeout_s", "end_timeout_s", "max_artifact_gb"):
            if not getattr(self, name) > 0:
                raise BadInput(f"tracking.{name}={getattr(self, name)} must be greater than 0.")


@dataclass(frozen=True)
class Job:
    """What the process reads first, a JSON file. `metrics` is the file to mirror, None where there is none; `best` says
    for patterns of names which value stands for the run.
    """

    config: TrackingConfig
    id: str
    name: str
    kind: str
    group: str
    folder: str
    metrics: str | None
    settings: dict[str, Any]
    best: dict[str, str]
    pid: int = field(default_factory=os.getpid)

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text())
        return cls(**{**values, "config": TrackingConfig(**values["config"])})


class Mirror:
    """A W&B run of the command at work in `folder`, of a `kind` such as train, called `name`; its files lie there, or
    in WANDB_DIR. A folder has one W&B run, whoever works in it, and however often.

    `settings` are its configuration, to which git's state and the Slurm job are added. No method raises.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        name: str,
        kind: str,
        study: str,
        settings: dict[str, Any],
        metrics: Path | None = None,
        best: Mapping[str, str] | None = None,
    ):
        self._config = config
        self._process: subprocess.Popen[str] | None = None
        mode = mode_of(config, os.environ)
        if mode == DISABLED:
            return
        facts = settings | {"git": git_state(), "slurm": slurm_job(os.environ)}
        try:
            job = Job(
                config,
                run_id(folder),
                name,
                kind,
                config.group or study,
                os.environ.get("WANDB_DIR") or str(folder.resolve()),
                None if metrics is None else str(metrics.resolve()),
                facts,
                dict(best or {}),
            )
            path = folder / "wandb" / "job.json"
            publish(path, json.dumps(asdict(job), default=str).encode())
            self._process = _started(path, mode)
        except OSError as error:
            log.warning("W&B cannot be started (%s): the command goes on without it", error)

    def show(
        self,
        numbers: Values | None = None,
        tables: Mapping[str, Path] | None = None,
        pages: Mapping[str, Path] | None = None,
    ) -> None:
        """Log results by their names: numbers and histograms, tables (CSV files with a heading), pages (HTML files)."""
        files = {"tables": tables or {}, "pages": pages or {}}
        named = {kind: {name: str(path.resolve()) for name, path in paths.items()} for kind, paths in files.items()}
        values = {name: plain(value) for name, value in (numbers or {}).items()}
        self._send({"show": {"numbers": values, **named}})

    def artifact(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        """Upload files, by their names in the artifact, unless `tracking.artifacts` is off. They must not change."""
        if self._config.artifacts:
            paths = {inside: str(path.resolve()) for inside, path in files.items()}
            self._send({"artifact": {"name": name, "kind": kind, "files": paths}})

    def end(self, status: int = FAILED) -> None:
        """End the run with `status` (0 = finished, STOPPED = to be continued) and wait for its uploads, not for long
        unless it is finished. Doing it twice does nothing.
        """
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        finished, limit_s = status == 0, self._config.end_timeout_s
        limit_s = limit_s if finished else min(HURRY_S, limit_s)
        _write(process, {"end": {"status": status, "limit_s": limit_s}})
        with suppress(OSError):  # it is gone, and with it what was not sent
            process.stdin.close()
        try:
            # One that is only starting is not waited for where the next start tells W&B everything.
            process.wait(limit_s + GRACE_S + finished * self._config.start_timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("W&B did not end in time and was ended; metrics.jsonl has everything")
            process.kill()

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is not None:
            _write(self._process, message)


def _started(job: Path, mode: str) -> subprocess.Popen[str]:
    """The process, in a session of its own: Ctrl-C and what a scheduler sends to a group are the command's alone."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    defaults = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    environment = {**defaults, **os.environ, "PYTHONPATH": path, "WANDB_MODE": mode}
    environment.pop(SERVICE, None)
    return subprocess.Popen(
        [sys.executable, "-m", "extract.mirroring", str(job.resolve()), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    )


def _write(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    """A pipe takes 64 kB before anybody reads, which is more than all messages."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except OSError:  # it ended, and has said why
        log.debug("W&B's process is gone")


def mode_of(config: TrackingConfig, environment: Mapping[str, str]) -> str:
    """The mode: as set, else what the environment says, else offline."""
    if config.mode is not None:
        return config.mode
    if environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return DISABLED
    return MODES.get(environment.get("WANDB_MODE", "").lower(), OFFLINE)


def run_id(folder: Path) -> str:
    """The id of the W&B run of a folder, drawn when it is first asked for."""
    path = folder / "wandb" / "id"
    if not path.exists():
        publish(path, uuid.uuid4().hex[:16].encode())
    return path.read_text()


def git_state() -> dict[str, Any]:
    """Commit of the source tree, and whether it has changes; None where there is no git."""
    commit = provenance()["git_commit"]
    return {"commit": commit and commit.removesuffix("+"), "dirty": commit and commit.endswith("+")}


def slurm_job(environment: Mapping[str, str]) -> dict[str, str]:
    """What Slurm says about the job; empty where there is none."""
    return {name: environment[key] for name, key in SLURM.items() if key in environment}
