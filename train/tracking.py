"""Where the metrics of a training run go: `metrics.jsonl`, always, and Weights & Biases, which mirrors it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from extract.metrics_file import MetricsFile, Values
from extract.mirror import FAILED, STOPPED, Mirror
from train.config import TrainSettings
from train.metric_table import best_values, units


class Tracker:
    """Both, of one run in its folder, which continues after `steps_done` steps. `manifests` are hashes of the data by
    what they are of.
    """

    def __init__(self, settings: TrainSettings, folder: Path, steps_done: int, manifests: dict[str, str]):
        path = folder / "metrics.jsonl"
        self._name, self._status = f"{settings.study}-{folder.name}", FAILED
        self._file = MetricsFile(path, steps_done)
        facts = asdict(settings) | {"manifests": manifests, "units": units("train", "val", "speed", "memory")}
        self._mirror = Mirror(
            settings.tracking, folder, folder.name, "train", settings.study, facts, path, best_values()
        )

    def log(self, step: int, metrics: Values) -> None:
        self._file.log(step, metrics)

    def sync(self) -> None:
        self._file.sync()

    def ended(self, crosscoder_folder: Path | None) -> None:
        """Say that the run ends as it should: finished, with its crosscoder, or (None) to be continued."""
        self._status = STOPPED if crosscoder_folder is None else 0
        if crosscoder_folder is not None:
            files = {path.name: path for path in sorted(crosscoder_folder.iterdir())}
            self._mirror.artifact(f"crosscoder-{self._name}", "crosscoder", files)

    def close(self) -> None:
        self._file.close()
        self._mirror.end(self._status)


class Nowhere:
    """Where all ranks but one track."""

    def log(self, step: int, metrics: Values) -> None: ...

    def sync(self) -> None: ...

    def ended(self, crosscoder_folder: Path | None) -> None: ...

    def close(self) -> None: ...


def manifests_of(models: Sequence[str], content_sha256: Sequence[str]) -> dict[str, str]:
    """The hashes of `TrainingData.content_sha256` by what they are of: tokens, then each model's activations."""
    return dict(zip(["tokens", *models], content_sha256, strict=True))
