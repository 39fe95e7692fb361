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

from analysis import tables
from analysis.config import NOT_MODELS, AnalysisSettings, OwnerConfig
from analysis.examples.database import reading
from analysis.latents.columns import models_of, of_two_models, owners_in_order, read_columns
from analysis.report import figure_selection, figures, side_tables
from analysis.report.cards import Card, Row, cards_of, placed_by_hand, read_rows
from analysis.report.certainty import Counted, counted
from analysis.report.figures import Drawn
from analysis.report.nearest import Near, nearest_to
from analysis.report.null_ranges import NULLS, read_nulls
from analysis.report.redaction import redacted
from analysis.taxonomy.step import DEFAULT, OTHER, load_taxonomy
from extract.config import split_member
from extract.errors import BadInput


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
    of optional files of its folder. `certainty` of the owners is empty for an analysis without intervals.
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
    certainty: dict[str, Counted]

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
    config, groups = settings.analysis.owner, _groups(settings)
    with reading(folder) as database:
        cards = redacted(_cards(settings, folder, named, groups), shown.redact, database, groups)
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
        tables=side_tables.of_pair(folder, target / "tables"),
        certainty=counted(rows, models, own, config),
    )


def _cards(settings: AnalysisSettings, folder: Path, named: set[int], groups: Mapping[str, str]) -> list[Card]:
    """The cards with the categories that comparisons are made of."""
    cards = cards_of(folder, settings.analysis.report, named, settings.analysis.owner)
    return [placed_by_hand(card, groups) for card in cards] if settings.analysis.compare.human_labels else cards


def _groups(settings: AnalysisSettings) -> dict[str, str]:
    """The classes of the categories of the taxonomy."""
    categories = load_taxonomy(Path(settings.analysis.taxonomy.path or DEFAULT))
    return {category.name: category.group for category in categories} | {OTHER: OTHER}


def _nearest(models: list[str], rows: list[Row], owners: Counter[str], config: OwnerConfig) -> dict[str, list[Near]]:
    return {model: nearest_to(model, rows, models, config) for model in models if not owners[model]}


def _curves(
    metrics: figures.Metrics, models: list[str], colours: Mapping[str, str], target: Path, name: str
) -> Drawn | None:
    if not metrics:
        return None
    figure = figures.training_curves(metrics, models, dict(colours))
    return figures.draw(figure, target, f"training_{name}", [f"../runs/{name}/metrics.jsonl"], figures.TRAINING)


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
        drawn = figures.draw(selection, target, f"figure1_{name}", sources, figure_selection.caption_of(owner))
        scatter = figures.draw(nu, target, f"nu_{name}", sources, figure_selection.NU_CAPTION)
        panels.append(Panel(base, tuned, drawn, scatter))
    return panels


def read_metrics(path: Path) -> figures.Metrics:
    """The lines of `metrics.jsonl` but a last one that a killed run left torn; none if the run was trained elsewhere.

    BadInput for another line that is no JSON object.
    """
    *whole, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise BadInput(f"{path}, line {number}, is no JSON: {line[:80]!r}. Correct or remove the line.") from error
    return found


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
    """The settings a run was trained with; empty if the run was trained elsewhere. BadInput for what is no YAML."""
    try:
        found = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no YAML. Restore it, or remove it to have a report without it.") from error
    return found if isinstance(found, dict) else {}


def owner_table(pairs: list[Pair]) -> tables.Table:
    """Latents by owner, one row for each owner in each pair, and how many of them are certain by nu's intervals."""
    rows = [
        (pair.name, owner, count, pair.num_latents, pair.certainty.get(owner))
        for pair in pairs
        for owner, count in pair.owners.items()
    ]
    names = ("certain", "crosses", "unknown", "within_reach")
    return tables.Table(
        name="owners",
        caption="Latents of each crosscoder by owner; certain: both ν's whole intervals lie within the thresholds; "
        "crosses: a threshold lies within an interval; unknown: without an interval; within reach: candidates by "
        "decoder norms that are not the model's own, but whose intervals reach within the thresholds.",
        columns=["pair", "owner", "count", "total", *names],
        raw=[
            [pair, owner, count, total, *(getattr(sure, name, None) for name in names)]
            for pair, owner, count, total, sure in rows
        ],
        heading=["pair", "owner", "latents", "share", "certain", "crosses", "unknown", "within reach"],
        printed=[
            [pair, owner, f"{count:,}", tables.percent(count / total)]
            + [f"{getattr(sure, name):,}" if sure else "" for name in names]
            for pair, owner, count, total, sure in rows
        ],
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
