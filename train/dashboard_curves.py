"""What runs have logged so far, as curves of limited length: reads metrics.jsonl of runs that are done, at work or
broken off.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from train.metric_table import METRICS, NUMBER, metric_of


@dataclass(frozen=True)
class Curve:
    """Values at ascending steps; None where a value was not finite. `num_logged` values are shown by these."""

    steps: list[float]
    values: list[float | None]
    num_logged: int


@dataclass(frozen=True)
class Bins:
    """The histogram of one step."""

    step: float
    edges: list[float]
    counts: list[float]


@dataclass(frozen=True)
class RunLog:
    """A run: its curves and last histograms by the names of metrics, the settings that it saved, {} without any, the
    number of lines that could not be read, and the time of the last line, 0 where there is none.
    """

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    histograms: dict[str, Bins] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    num_damaged: int = 0
    written: float = 0.0

    @property
    def last_step(self) -> float:
        return max((curve.steps[-1] for curve in self.curves.values()), default=0)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, if its settings tell."""
        training = self.settings.get("training") or {}
        tokens, each = training.get("num_tokens"), training.get("num_tokens_per_step")
        return -(-tokens // each) if isinstance(tokens, int) and isinstance(each, int) and each > 0 else None

    def setting(self, name: str) -> Any:
        """A setting by its dotted name; None where it is not known."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def best(self, name: str) -> float | None:
        """The value of a curve that stands for the run: the last or, where METRICS says so, the largest or smallest."""
        metric = metric_of(name)
        known = [value for value in self.curves[name].values if value is not None] if name in self.curves else []
        if not known:
            return None
        return {"max": max, "min": min}.get(metric.best if metric else "last", lambda values: values[-1])(known)


def points_each(max_points: int, num_runs: int) -> int:
    """Points that a curve may have so that all curves of all runs have `max_points` about."""
    num_curves = num_runs * sum(metric.kind == NUMBER for metric in METRICS)
    return max(20, max_points // max(1, num_curves))


def read_run(name: str, folder: Path, num_points: int) -> RunLog:
    """The run in `folder`, with `num_points` points a curve, about. What `train.evaluate` measured is part of it, where
    the run itself has not measured the same.
    """
    files = [folder / "evaluation.jsonl", folder / "metrics.jsonl"]
    there = [file for file in files if file.is_file()]
    curves: dict[str, Curve] = {}
    histograms: dict[str, Bins] = {}
    num_damaged = 0
    for file in there:
        found, bins, damaged = _read(file)
        curves |= {name: _curve(*columns, num_points) for name, columns in found.items()}
        histograms |= bins
        num_damaged += damaged
    written = max((file.stat().st_mtime for file in there), default=0.0)
    return RunLog(name, curves, histograms, _settings(folder / "config.yaml"), num_damaged, written)


def _settings(file: Path) -> dict[str, Any]:
    """What a run saved; nothing where it has not, or is just doing so."""
    try:
        saved = yaml.safe_load(file.read_bytes()) if file.is_file() else {}
    except yaml.YAMLError:
        return {}
    return saved if isinstance(saved, dict) else {}


def _read(file: Path) -> tuple[dict[str, tuple[array[float], array[float]]], dict[str, Bins], int]:
    """Steps and values of every number, the last histogram of every kind, and how many lines are damaged."""
    columns: dict[str, tuple[array[float], array[float]]] = {}
    histograms: dict[str, Bins] = {}
    num_damaged = 0
    for line in _lines(file):
        if line is None:
            num_damaged += 1
            continue
        step = float(line.pop("step"))
        for name, value in line.items():
            if isinstance(value, dict):
                if len(value.get("edges", [])) == len(value.get("counts", [])) + 1:
                    histograms[name] = Bins(step, value["edges"], value["counts"])
            elif _is_number(name, value):
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(math.nan if value is None else float(value))
    return columns, histograms, num_damaged


def _is_number(name: str, value: object) -> bool:
    """Whether a value of a line is that of a metric: evaluation.jsonl has other facts besides."""
    return "/" in name and (value is None or isinstance(value, int | float))


def _lines(file: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of a file, None for those that are damaged; the last one may still be being written, and is left out
    then.
    """
    with file.open("rb") as opened:
        for text in opened:
            try:
                line = json.loads(text)
                is_whole = math.isfinite(line["step"])
            except (ValueError, TypeError, KeyError):
                is_whole = False
            if is_whole or text.endswith(b"\n"):
                yield line if is_whole else None


def _curve(steps: array[float], values: array[float], num_points: int) -> Curve:
    x, y = np.array(steps), np.array(values)
    order = np.argsort(x, kind="stable")  # lines of evaluation.jsonl are in no order
    x, y = x[order], y[order]
    kept = thinned(y, num_points)
    shown = [float(f"{value:.6g}") if math.isfinite(value) else None for value in y[kept]]
    return Curve(x[kept].tolist(), shown, len(y))


def thinned(values: np.ndarray, num_points: int) -> np.ndarray:
    """Ascending places of about `num_points` values that show the same curve: the smallest and the largest of every
    stretch, one that is not finite where there is any, the first and the last. All places where these are few enough.
    """
    if len(values) <= num_points:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), max(1, num_points // 2)):
        finite = np.isfinite(values[stretch])
        known, unknown = stretch[finite], stretch[~finite]
        if len(known):
            kept |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
        kept |= set(unknown[:1].tolist())
    return np.array(sorted(kept))
