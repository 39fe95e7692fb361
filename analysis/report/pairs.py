"""What the report shows of one crosscoder: its training, its figures, owners of its latents, and their cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.config import NOT_MODELS, AnalysisSettings, OwnerConfig
from analysis.examples.database import reading
from analysis.human import unused_labels
from analysis.latents.certainty import Counted, counted
from analysis.latents.columns import models_of, of_two_models, owners_in_order, read_columns
from analysis.made_with import Selection, selection_of
from analysis.report import figure_selection, figures, side_tables
from analysis.report.cards import Card, Row, cards_of, placed_by_hand, read_rows
from analysis.report.figures import Drawn
from analysis.report.nearest import Near, nearest_to
from analysis.report.null_ranges import NULLS, read_nulls
from analysis.report.redaction import redacted
from analysis.report.training import draw_curves, explained, read_config, read_metrics
from analysis.taxonomy.step import DEFAULT, OTHER, load_taxonomy
from extract.config import split_member


@dataclass(frozen=True)
class Panel:
    """The figures of the base and one tuned model of a crosscoder: Figure 1, the files of its panels alone, relative to
    the page, and both nu with each model as focus.
    """

    base: str
    tuned: str
    selection: Drawn
    alone: list[str]
    nu: Drawn


@dataclass(frozen=True)
class Pair:
    """Everything that the report shows of one crosscoder.

    `num_own` counts the latents of each model, and of each set of several, that other models lack. `tables` are those
    of optional files of its folder. `certainty` of the owners is empty for an analysis without intervals.
    `unused_labels` says how many labels by hand are of another crosscoder, where some are.
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
    unused_labels: str
    selection: Selection

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
    selection, groups = selection_of(folder), _groups(settings)
    config = selection.owner
    with reading(folder) as database:
        cards = redacted(_cards(settings, folder, named, groups, config), shown.redact, database, groups)
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
        curves=draw_curves(metrics, models, colours, target, folder.name),
        panels=_panels(folder, models, dict(colours), config, target),
        tables=side_tables.of_pair(folder, target / "tables"),
        certainty=counted(rows, models, own, config),
        unused_labels=unused_labels(folder).replace(str(folder), f"analysis/{folder.name}"),
        selection=selection,
    )


def selections_of(pairs: list[Pair]) -> list[tuple[Selection, list[str]]]:
    """The ways in which latents were selected, mostly one, and the names of the pairs of each."""
    found: list[tuple[Selection, list[str]]] = []
    for pair in pairs:
        names = next((names for selection, names in found if selection == pair.selection), None)
        if names is None:
            found.append((pair.selection, [pair.name]))
        else:
            names.append(pair.name)
    return found


def _cards(
    settings: AnalysisSettings, folder: Path, named: set[int], groups: Mapping[str, str], config: OwnerConfig
) -> list[Card]:
    """The cards with the categories that comparisons are made of."""
    cards = cards_of(folder, settings.analysis.report, named, config)
    return [placed_by_hand(card, groups) for card in cards] if settings.analysis.compare.human_labels else cards


def _groups(settings: AnalysisSettings) -> dict[str, str]:
    """The classes of the categories of the taxonomy."""
    categories = load_taxonomy(Path(settings.analysis.taxonomy.path or DEFAULT))
    return {category.name: category.group for category in categories} | {OTHER: OTHER}


def _nearest(models: list[str], rows: list[Row], owners: Counter[str], config: OwnerConfig) -> dict[str, list[Near]]:
    return {model: nearest_to(model, rows, models, config) for model in models if not owners[model]}


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
            figures.save(panel, target / "figures", f"figure1_{kind}_{name}")
        selection = figure_selection.figure_one(shown, pair, colours, owner, nulls)
        nu = figure_selection.nu_scatter(shown, pair, colours, owner, nulls)
        drawn = figures.draw(selection, target, f"figure1_{name}", sources, figure_selection.caption_of(owner))
        scatter = figures.draw(nu, target, f"nu_{name}", sources, figure_selection.NU_CAPTION)
        alone = [f"figures/figure1_{kind}_{name}.pdf" for kind in figure_selection.PANELS]
        panels.append(Panel(base, tuned, drawn, alone, scatter))
    return panels


def share_dropped(folder: Path) -> float | None:
    """Share of the tokens that statistics, training and analysis left out, as the analysis found it."""
    found = (pq.read_schema(folder / "latents.parquet").metadata or {}).get(b"share_dropped")
    return None if found is None else float(found)
