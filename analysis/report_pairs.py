"""What the report shows of one crosscoder: its training, its figures, owners of its latents, and their cards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from analysis import figure_selection, figures, side_tables, tables
from analysis.cards import Card, Row, cards_of, read_rows, reading
from analysis.columns import models_of, of_two_models, owners_in_order, read_columns
from analysis.config import NOT_MODELS, AnalysisSettings, OwnerConfig
from analysis.figures import Drawn
from analysis.nearest import Near, nearest_to
from analysis.null_ranges import NULLS, read_nulls
from analysis.redaction import redacted
from extract.config import split_member


@dataclass(frozen=True)
class Panel:
    """The figures of the base and one tuned model of a crosscoder: Figure 1, and both nu with each model as focus."""

    base: str
    tuned: str
    selection: Drawn
    nu: Drawn


@dataclass(frozen=True)
class Pair:
    """Everything that the report shows of one crosscoder.

    `num_own` counts the latents of each model, and of each set of several, that other models lack. `tables` are those
    of optional files of its folder.
    """

    name: str
    models: list[str]
    owners: dict[str, int]
    num_latents: int
    num_dedicated: int
    share_dropped: float | None
    variance_explained: dict[str, float]
    run: dict[str, Any]
    cards: list[Card]
    num_own: dict[str, int]
    nearest: dict[str, list[Near]]
    curves: Drawn | None
    panels: list[Panel]
    tables: list[side_tables.SideTable]

    @property
    def has_plain_members(self) -> bool:
        """Whether a model's name does not say its hookpoint."""
        return any(split_member(member)[1] is None for member in self.models)


def pair_of(
    settings: AnalysisSettings, folder: Path, named: set[int], colours: Mapping[str, str], target: Path
) -> Pair:
    """Read an analysis folder and draw its figures; the latents in `named` have cards in any case."""
    models, rows, shown = models_of(folder), read_rows(folder), settings.analysis.report
    owners = Counter(row["owner"] for row in rows)
    own = list(dict.fromkeys([*models, *owners_in_order(owners, models)]))
    run = Path(settings.outputs) / "runs" / folder.name
    metrics = read_metrics(run / "metrics.jsonl")
    config = settings.analysis.owner
    with reading(folder) as database:
        cards = redacted(cards_of(folder, shown, named), shown.redact, database)
    return Pair(
        name=folder.name,
        models=models,
        owners={owner: owners[owner] for owner in [*own, *NOT_MODELS]},
        num_latents=len(rows),
        share_dropped=share_dropped(folder),
        num_dedicated=sum(bool(row["dedicated"]) for row in rows),
        variance_explained=explained(metrics, models),
        run=read_config(run / "config.yaml"),
        cards=cards,
        num_own={owner: owners[owner] for owner in own},
        nearest=_nearest(models, rows, owners, config),
        curves=_curves(metrics, models, colours, target, folder.name),
        panels=_panels(folder, models, dict(colours), config, target),
        tables=side_tables.of_pair(folder),
    )


def _nearest(models: list[str], rows: list[Row], owners: Counter[str], config: OwnerConfig) -> dict[str, list[Near]]:
    return {model: nearest_to(model, rows, models, config) for model in models if not owners[model]}


def _curves(
    metrics: figures.Metrics, models: list[str], colours: Mapping[str, str], target: Path, name: str
) -> Drawn | None:
    if not metrics:
        return None
    figure = figures.training_curves(metrics, models, dict(colours))
    return figures.draw(figure, target, f"training_{name}", [f"../runs/{name}/metrics.jsonl"])


def _panels(folder: Path, models: list[str], colours: dict[str, str], owner: OwnerConfig, target: Path) -> list[Panel]:
    """The figures of every (base, tuned) pair of models of a crosscoder, of which there is mostly one."""
    columns, panels = read_columns(folder), []
    nulls = read_nulls(folder)
    sources = [f"../analysis/{folder.name}/{name}" for name in ("latents.parquet", *([NULLS] if nulls else []))]
    for base, tuned in [(models[0], tuned) for tuned in models[1:]]:
        pair = [base, tuned]
        shown, name = of_two_models(columns, models, base, tuned), folder.name
        if len(models) > 2:
            name += f"_{base}_{tuned}"
        for kind in figure_selection.PANELS:
            panel = figure_selection.single_panel(kind, shown, pair, colours, owner, nulls)
            figures.save(panel, target / "figures", f"figure1_{kind}_{name}", ("pdf",))
        selection = figure_selection.figure_one(shown, pair, colours, owner, nulls)
        nu = figure_selection.nu_scatter(shown, pair, colours, owner, nulls)
        drawn = figures.draw(selection, target, f"figure1_{name}", sources)
        panels.append(Panel(base, tuned, drawn, figures.draw(nu, target, f"nu_{name}", sources)))
    return panels


def read_metrics(path: Path) -> figures.Metrics:
    """The lines of `metrics.jsonl`; none if the run was trained elsewhere."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def share_dropped(folder: Path) -> float | None:
    """Share of the tokens that statistics, training and analysis left out, as the analysis found it."""
    found = (pq.read_schema(folder / "latents.parquet").metadata or {}).get(b"share_dropped")
    return None if found is None else float(found)


def explained(metrics: figures.Metrics, models: list[str]) -> dict[str, float]:
    """The last held-out variance explained of each model that has one."""
    values = {model: last_value(metrics, f"val/variance_explained/{model}") for model in models}
    return {model: value for model, value in values.items() if value is not None}


def last_value(metrics: figures.Metrics, name: str) -> float | None:
    """The last logged value of one number."""
    values = figures.series(metrics, name)[1]
    return values[-1] if values else None


def read_config(path: Path) -> dict[str, Any]:
    """The settings a run was trained with; empty if the run was trained elsewhere."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def owner_table(pairs: list[Pair]) -> tables.Table:
    """Latents by owner, one row for each owner in each pair."""
    rows = [(pair.name, owner, count, pair.num_latents) for pair in pairs for owner, count in pair.owners.items()]
    return tables.Table(
        name="owners",
        caption="Latents of each crosscoder by owner.",
        columns=["pair", "owner", "count", "total"],
        raw=[list(row) for row in rows],
        heading=["pair", "owner", "latents", "share"],
        printed=[[pair, owner, f"{count}", tables.percent(count / total)] for pair, owner, count, total in rows],
    )


def latent_table(pairs: list[Pair]) -> tables.Table:
    """The model-specific latents on the cards."""
    cards = [card for pair in pairs for card in pair.cards]
    numbers = ["delta_norm", "nu_error", "nu_reconstruction", "frequency", "max_activation"]
    columns = ["pair", "latent", "owner", "outcome", "label", "confidence", "category", *numbers]
    columns += ["dedicated", "annotator"]
    annotators = "; ".join(sorted({card.annotator for card in cards})) or "none"
    return tables.Table(
        name="latents",
        caption=f"Model-specific latents; labels and categories by the annotator {annotators}.",
        columns=columns,
        raw=[[getattr(card, column) for column in columns] for card in cards],
        heading=["label", "pair", "latent", "model", "category", "Δ-norm", "ν error", "ν reconstruction"],
        printed=[
            [
                card.label or f"({card.outcome})",
                card.pair,
                str(card.latent),
                card.owner,
                card.category,
                *(tables.number(value) for value in (card.delta_norm, card.nu_error, card.nu_reconstruction)),
            ]
            for card in cards
        ],
    )
