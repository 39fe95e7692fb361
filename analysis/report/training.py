"""The training of a crosscoder as its run's folder tells it: settings, metrics, and their curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from analysis.report import figures
from analysis.report.figures import INK, STYLE, WIDTH, Drawn, brief
from extract.errors import BadInput

Metrics = list[dict[str, Any]]

CAPTION = (
    "Left, training loss of each step, all terms. Right, share of the variance of each model's activations that the "
    "crosscoder explains: training tokens faint, held-out documents strong, the last held-out value in the legend."
)


def read_metrics(path: Path) -> Metrics:
    """The lines of `metrics.jsonl` but a last one that a killed run left torn; none if the run was trained elsewhere.

    BadInput for another line that is no JSON object.
    """
    *whole, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return [_row(path, number, line) for number, line in enumerate(whole, 1) if line.strip()]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return {"step": None, **json.loads(line)}
    except (ValueError, TypeError) as error:
        what = f"{path}, line {number}, is no JSON object: {line[:80]!r}"
        raise BadInput(f"{what}. Correct or remove the line.") from error


def explained(metrics: Metrics, models: list[str]) -> dict[str, float]:
    """The last held-out variance explained of each model that has one."""
    values = {model: last_value(metrics, f"val/variance_explained/{model}") for model in models}
    return {model: value for model, value in values.items() if value is not None}


def last_value(metrics: Metrics, name: str) -> float | None:
    """The last logged value of one number."""
    values = series(metrics, name)[1]
    return values[-1] if values else None


def read_config(path: Path) -> dict[str, Any]:
    """The settings a run was trained with; empty if the run was trained elsewhere. BadInput for what is no YAML."""
    try:
        found = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no YAML. Restore it, or remove it to have a report without it.") from error
    return found if isinstance(found, dict) else {}


def draw_curves(
    metrics: Metrics, models: list[str], colours: Mapping[str, str], target: Path, name: str
) -> Drawn | None:
    """The curves of the crosscoder `name` in the report's folder `target`; None without metrics."""
    if not metrics:
        return None
    figure = training_curves(metrics, models, colours)
    return figures.draw(figure, target, f"training_{name}", [f"../runs/{name}/metrics.jsonl"], CAPTION)


def training_curves(metrics: Metrics, models: list[str], colours: Mapping[str, str]) -> Figure:
    """The whole loss of the training steps, and variance explained: training faint, held-out documents strong."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        loss, explained = figure.subplots(1, 2)
        loss.plot(*series(metrics, "train/loss"), color=INK)
        loss.set(title="Training loss, all terms", xlabel="step")
        for model in models:
            name = f"variance_explained/{model}"
            explained.plot(*series(metrics, f"train/{name}"), color=colours[model], alpha=0.3, linewidth=0.8)
            held_out = series(metrics, f"val/{name}")
            last = f"  {held_out[1][-1]:.3f}" if len(held_out[1]) else ""
            explained.plot(
                *held_out, color=colours[model], marker="o", markersize=2.5, label=f"{brief(model, 30)}{last}"
            )
        explained.set(title="Variance explained (held-out strong, training faint)", xlabel="step")
        low = min(
            (value for model in models for value in series(metrics, f"val/variance_explained/{model}")[1]), default=0.0
        )
        explained.set_ylim(max(min(0.0, low), -0.2), 1)
        explained.legend(loc="lower right")
        for axes in (loss, explained):
            axes.set_xlim(left=0)
        return figure


def series(metrics: Metrics, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged number; steps without it, or where it was not finite, are left out."""
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None and row["step"] is not None]
    return [step for step, _ in points], [value for _, value in points]
