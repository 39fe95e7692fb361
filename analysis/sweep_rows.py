"""What is known of every run of a study: its settings, how far it is, and what came of it.

Runs are those that have a folder, and those that a sweep wrote down and that have none yet. Nothing is measured here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from analysis.config import AnalysisSettings, OwnerConfig
from analysis.latents.columns import read_columns
from analysis.latents.owners import holders
from analysis.report.training import last_value, read_metrics
from extract.errors import BadInput
from train.crosscoder import CONFIG_FILE, WEIGHTS_FILE, Crosscoder
from train.histograms import delta_norm
from train.runs import SECTIONS, deciding, leaves

FINISHED, DAMAGED = "finished", "damaged crosscoder"


@dataclass
class Row:
    """One run. What came of it is empty unless `state` is FINISHED: `l0` and `variance_explained` of held-out tokens;
    how many latents belong to each model alone, as analysed (`own`), and as decoder norms alone would have it.
    """

    name: str
    settings: dict[str, Any]
    state: str
    l0: float = math.nan
    variance_explained: dict[str, float] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)
    own_by_norms: dict[str, int] = field(default_factory=dict)

    @property
    def pair(self) -> str:
        return self.name.split(",")[0]

    @property
    def is_finished(self) -> bool:
        return self.state == FINISHED

    @property
    def mean_explained(self) -> float:
        values = self.variance_explained.values()
        return sum(values) / len(values) if values else math.nan

    @property
    def num_own(self) -> float:
        """Latents of one tuned model alone, as analysed: of all models but the first; NaN where that was not done."""
        return _tuned(self.own)

    @property
    def num_own_by_norms(self) -> float:
        return _tuned(self.own_by_norms)


def _tuned(own: dict[str, int]) -> float:
    """What tuning added: a run whose base has many latents of its own is none the better for it."""
    return sum(list(own.values())[1:]) if own else math.nan


def rows_of(settings: AnalysisSettings) -> list[Row]:
    """The runs of the selected pairs, sorted by their settings. BadInput where there are none."""
    outputs = Path(settings.outputs)
    records = {path.stem: json.loads(path.read_bytes()) for path in (outputs / "sweeps").glob("*.json")}
    folders = {path.parent.name for path in (outputs / "runs").glob("*/config.yaml")}
    names = [name for name in records.keys() | folders if settings.pair in (None, name.split(",")[0])]
    if not names:
        which = f" of {settings.pair}" if settings.pair else ""
        raise BadInput(f"{outputs} has no runs{which}. Run a sweep: python -m train -m ... crosscoder.k=50,100,200.")
    rows = [_row(outputs, name, records.get(name, {}), settings.analysis.owner) for name in names]
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    """By pair, layer, k, then the other settings, numbers by their size."""
    others = [
        (name, (value, "") if isinstance(value, int | float) else (math.inf, str(value)))
        for name, value in sorted(row.settings.items())
    ]
    return row.pair, block_order(row.settings["hookpoint"]), row.settings["crosscoder.k"], others


def block_order(hookpoint: str) -> list[int]:
    """Sorts "block9" before "block10"."""
    return [int(name.removeprefix("block")) for name in hookpoint.split(",")]


def _row(outputs: Path, name: str, record: dict[str, Any], owner: OwnerConfig) -> Row:
    folder = outputs / "runs" / name
    settings = record.get("settings") or result_settings_in(folder / "config.yaml")
    metrics = read_metrics(folder / "metrics.jsonl")
    try:
        crosscoder = Crosscoder.load(folder / "crosscoder")
    except BadInput:
        is_damaged = (folder / "crosscoder" / WEIGHTS_FILE).exists()
        return Row(name, settings, DAMAGED if is_damaged else state_of(settings, metrics, record))
    explained = {model: last_value(metrics, f"val/variance_explained/{model}") for model in crosscoder.models}
    return Row(
        name,
        settings,
        FINISHED,
        _number(last_value(metrics, "val/l0")),
        {model: _number(value) for model, value in explained.items()},
        analysed(outputs / "analysis" / name, folder / "crosscoder", crosscoder.models),
        by_norms(crosscoder, owner),
    )


def result_settings_in(config_file: Path) -> dict[str, Any]:
    """The settings that decided a run, by their dotted names, from what it saved."""
    saved = yaml.safe_load(config_file.read_text())
    return deciding(dict(leaf for section in SECTIONS if section in saved for leaf in leaves(section, saved[section])))


def state_of(settings: dict[str, Any], metrics: list[dict[str, Any]], record: dict[str, Any]) -> str:
    """How far an unfinished run is, and how it ended if that is known."""
    num_steps = -(-settings["training.num_tokens"] // settings["training.num_tokens_per_step"])
    done = f"step {metrics[-1]['step']} of {num_steps}" if metrics else "no step yet"
    ended, job = record.get("ended"), record.get("job")
    return f"{done}, {ended}" if ended else f"{done}, job {job}" if job else done


def analysed(folder: Path, crosscoder_folder: Path, models: list[str]) -> dict[str, int]:
    """Latents that belong to each model alone, as the analysis of this crosscoder found; {} without one."""
    record = folder / "latents.json"
    if not record.exists():
        return {}
    weights = json.loads((crosscoder_folder / CONFIG_FILE).read_bytes()).get("sha256")
    if json.loads(record.read_bytes())["inputs"][WEIGHTS_FILE] != weights:  # that of an earlier one
        return {}
    owner = read_columns(folder)["owner"]
    return {model: int((owner == model).sum()) for model in models}


def by_norms(crosscoder: Crosscoder, owner: OwnerConfig) -> dict[str, int]:
    """Latents whose decoder norms allow one model alone to own them (`owners.holders`), dead ones counted: more than
    an analysis finds, for which these are the candidates.
    """
    with torch.no_grad():
        norms_LM = crosscoder.W_dec.view(-1, crosscoder.num_models, crosscoder.d_model).norm(dim=2)
    held_LM = holders(delta_norm(norms_LM).numpy(), crosscoder.dedicated_owner.numpy(), owner)
    alone_L = held_LM.sum(axis=1) == 1
    return {model: int((held_LM[:, m] & alone_L).sum()) for m, model in enumerate(crosscoder.models)}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
