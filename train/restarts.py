"""A requeued training job gets further or is refused: every start notes the step that it continues from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from extract.restarts import note_start
from train.checkpoint import newest_step
from train.config import TrainSettings


def note_run_start(settings: TrainSettings, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """BadInput where more restarts of this job than `max_restarts_without_progress` added no checkpoint to the run in
    `folder`. Called by one rank, before anything is opened; nothing is noted outside of Slurm.
    """
    step = newest_step(folder / "checkpoints")
    limit = settings.max_restarts_without_progress
    note_start(folder / "restarts.json", step, limit, f"step {step} of {folder}", environment)
