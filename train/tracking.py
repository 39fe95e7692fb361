"""Where metrics go: `metrics.jsonl`, always, and Weights & Biases, whose failures never end a run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extract.publish import publish
from train.config import TrackingConfig

log = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line, each with the number of steps done when it was written; non-finite values become null."""

    def __init__(self, path: Path, steps_done: int):
        """Open `path` for a run that continues after `steps_done` steps: lines of later steps are removed."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        publish(
            path, "".join(line for line in lines if _is_whole(line) and json.loads(line)["step"] <= steps_done).encode()
        )
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring all lines to disk: a checkpoint vouches for those before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Tracker:
    """Both, of one run in its folder, which continues after `steps_done` steps."""

    def __init__(self, config: TrackingConfig, folder: Path, steps_done: int, study: str, settings: dict[str, Any]):
        self._file = MetricsFile(folder / "metrics.jsonl", steps_done)
        self._wandb = WandbRun(config, folder, folder.name, study, settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._file.log(step, metrics)
        self._wandb.log(step, metrics)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        self._wandb.finish()


class Nowhere:
    """Where all ranks but one track."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _is_whole(line: str) -> bool:
    """A line cut short by a crash has no end."""
    return line.endswith("\n")


class WandbRun:
    """A W&B run beside `metrics.jsonl`. The first failure is logged and ends the tracking, not the training."""

    def __init__(self, config: TrackingConfig, folder: Path, name: str, study: str, settings: dict[str, Any]):
        self._run: Any = None
        if config.mode != "disabled":
            self._guard(lambda: self._start(config, folder, name, study, settings))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": step, **metrics}))

    def finish(self) -> None:
        if self._run is not None:
            self._guard(self._run.finish)

    def _start(self, config: TrackingConfig, folder: Path, name: str, study: str, settings: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or study,
            name=name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            mode=config.mode,  # type: ignore[arg-type]  # checked to be one of wandb's
            dir=folder,
            config=settings,
        )
        # A resumed offline run counts its own steps from 0 again, so ours is the axis.
        self._run.define_metric("*", step_metric="step")

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:  # whatever W&B raises must not end a run of days
            log.warning("W&B failed; the run goes on with metrics.jsonl alone", exc_info=True)
            self._run = None
