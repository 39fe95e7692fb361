"""The report of a study: one HTML file that needs no network, and its figures and tables for a paper.

outputs/STUDY/report/index.html, figures/*.pdf, figures/*.png, tables/*.csv, tables/*.tex
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis import behaviours, figures, tables
from analysis.annotate import ANNOTATOR
from analysis.cards import CONFIDENCE_ORDER, Card, Near, anchor_of, cards_of, nearest_to, read_rows
from analysis.columns import models_of, of_two_models, owners_in_order, read_columns
from analysis.comparison import Comparison, comparisons_of
from analysis.comparison import table_of as comparison_table
from analysis.config import NOT_MODELS, AnalysisSettings, OwnerConfig
from analysis.taxonomy import read_categories
from extract.config import split_member
from extract.errors import BadInput
from extract.publish import publish

NEEDED = ("latents.parquet", "examples.sqlite", "tags.csv", "annotations.jsonl", "categories.csv")


@dataclass(frozen=True)
class Pair:
    """Everything that the report shows of one crosscoder. `curves` is a data URI.

    `num_own` counts the latents of each model, and of each set of several, that other models lack.
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
    curves: str | None
    panels: list[Panel]

    @property
    def has_plain_members(self) -> bool:
        """Whether a model's name does not say its hookpoint."""
        return any(split_member(member)[1] is None for member in self.models)


@dataclass(frozen=True)
class Panel:
    """The figures of the base and one tuned model of a crosscoder, as data URIs."""

    base: str
    tuned: str
    delta_norm: str
    nu: str


@dataclass(frozen=True)
class Compared:
    """One comparison of two tuned models with its forest plot and its rows in print."""

    comparison: Comparison
    table: tables.Table
    forest: str


def report(settings: AnalysisSettings, folders: list[Path]) -> Path:
    """Write the report on the analysis `folders` and return the path of its page; the page is written last."""
    check_complete(folders)
    target = Path(settings.outputs) / "report"
    members = {folder.name: models_of(folder) for folder in folders}
    colours = figures.model_colours(list(members.values()))
    planted = settings.analysis.report.planted
    measured = [row for folder in folders for row in behaviours.read_measured(folder, members[folder.name], planted)]
    pairs = [_pair(settings, folder, measured, colours, target) for folder in folders]
    compared = [_compared(comparison, colours, target) for comparison in comparisons_of(settings, folders)]
    for table in [behaviours.table_of(measured), owner_table(pairs), latent_table(pairs)]:
        tables.write_table(table, target / "tables")
    page = render(settings, pairs, compared, measured, members, colours, encoders_of(folders))
    publish(target / "index.html", page.encode())
    return target / "index.html"


def check_complete(folders: list[Path]) -> None:
    """BadInput that names what is missing before anything is drawn."""
    if not folders:
        raise BadInput("There is no analysis to report on. Run `python -m analysis experiment=STUDY`.")
    for folder in folders:
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise BadInput(f"{folder} lacks {', '.join(missing)}. Run `python -m analysis` for this pair first.")


def encoders_of(folders: list[Path]) -> list[str]:
    """Who put the latents into categories, as the files themselves say."""
    return sorted({row.annotator for folder in folders for row in read_categories(folder)})


def _pair(
    settings: AnalysisSettings, folder: Path, measured: list[behaviours.Measured], colours: dict[str, str], target: Path
) -> Pair:
    models, rows = models_of(folder), read_rows(folder)
    owners = Counter(row["owner"] for row in rows)
    own = list(dict.fromkeys([*models, *owners_in_order(owners, models)]))
    named = {row.latent for row in measured if row.pair == folder.name and row.found and row.latent is not None}
    run = Path(settings.outputs) / "runs" / folder.name
    metrics = read_metrics(run / "metrics.jsonl")
    config = settings.analysis.owner
    curves = figures.training_curves(metrics, models, colours) if metrics else None
    return Pair(
        name=folder.name,
        models=models,
        owners={owner: owners[owner] for owner in [*own, *NOT_MODELS]},
        num_latents=len(rows),
        share_dropped=share_dropped(folder),
        num_dedicated=sum(bool(row["dedicated"]) for row in rows),
        variance_explained={
            model: last
            for model in models
            if (last := last_value(metrics, f"val/variance_explained/{model}")) is not None
        },
        run=read_config(run / "config.yaml"),
        cards=cards_of(folder, settings.analysis.report, named),
        num_own={owner: owners[owner] for owner in own},
        nearest={model: nearest_to(model, rows, models, config) for model in models if not owners[model]},
        curves=embed(curves, target, f"training_{folder.name}") if curves else None,
        panels=_panels(folder, models, colours, config, target),
    )


def _panels(folder: Path, models: list[str], colours: dict[str, str], owner: OwnerConfig, target: Path) -> list[Panel]:
    """The figures of every (base, tuned) pair of models of a crosscoder, of which there is mostly one."""
    columns, panels = read_columns(folder), []
    for base, tuned in [(models[0], tuned) for tuned in models[1:]]:
        shown, name = of_two_models(columns, models, base, tuned), folder.name
        if len(models) > 2:
            name += f"_{base}_{tuned}"
        delta_norm = figures.delta_norm_histogram(shown, [base, tuned], colours, owner)
        nu = figures.nu_scatter(shown, [base, tuned], colours, owner)
        delta_norm_uri, nu_uri = embed(delta_norm, target, f"delta_norm_{name}"), embed(nu, target, f"nu_{name}")
        panels.append(Panel(base, tuned, delta_norm_uri, nu_uri))
    return panels


def _compared(comparison: Comparison, colours: dict[str, str], target: Path) -> Compared:
    table = comparison_table(comparison)
    tables.write_table(table, target / "tables")
    return Compared(comparison, table, embed(figures.forest(comparison, colours), target, f"forest_{table.name}"))


def embed(figure: Figure, target: Path, name: str) -> str:
    """Save a figure for papers and return it as a data URI for the page."""
    figures.save(figure, target / "figures", name)
    return "data:image/svg+xml;base64," + base64.b64encode(figures.svg(figure)).decode()


def read_metrics(path: Path) -> figures.Metrics:
    """The lines of `metrics.jsonl`; none if the run was trained elsewhere."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def share_dropped(folder: Path) -> float | None:
    """Share of the tokens that statistics, training and analysis left out, as the analysis found it."""
    found = (pq.read_schema(folder / "latents.parquet").metadata or {}).get(b"share_dropped")
    return None if found is None else float(found)


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
    numbers = ["delta_norm", "nu_error", "nu_reconstruction", "frequency", "max_activation"]
    columns = ["latent", "owner", "label", "confidence", "category", *numbers, "dedicated", "annotator"]
    found = [(pair.name, card) for pair in pairs for card in pair.cards]
    return tables.Table(
        name="latents",
        caption=f"Model-specific latents; labels and categories by the annotator {ANNOTATOR}.",
        columns=["pair", *columns],
        raw=[[pair, *(getattr(card, column) for column in columns)] for pair, card in found],
        heading=["label", "pair", "latent", "model", "category", "Δ-norm", "ν error", "ν reconstruction"],
        printed=[
            [
                card.label,
                pair,
                str(card.latent),
                card.owner,
                card.category,
                *(tables.number(value) for value in (card.delta_norm, card.nu_error, card.nu_reconstruction)),
            ]
            for pair, card in found
        ],
    )


def render(
    settings: AnalysisSettings,
    pairs: list[Pair],
    compared: list[Compared],
    measured: list[behaviours.Measured],
    members: dict[str, list[str]],
    colours: dict[str, str],
    encoders: list[str],
) -> str:
    """The page."""
    columns = behaviours.columns_of(members)
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=settings.analysis.report.title or f"What tuning changed: {settings.study}",
        settings=settings,
        pairs=pairs,
        compared=compared,
        columns=columns,
        num_models=max(len(pair.models) for pair in pairs),
        values=list(dict.fromkeys(row.value for row in measured)),
        cells={(row.value, row.pair, row.owner): row for row in measured},
        answers=list(zip(columns, behaviours.answers(measured, columns), strict=True)),
        misplaced=behaviours.misplaced_in_base(measured, columns),
        anchors={card.anchor for pair in pairs for card in pair.cards},
        anchor_of=anchor_of,
        split_member=split_member,
        verdicts={row.verdict: behaviours.VERDICTS[row.verdict] for row in measured},
        measured=measured,
        colours={owner: figures.INK for pair in pairs for owner in pair.num_own} | colours,
        annotator=ANNOTATOR,
        confidence_order=CONFIDENCE_ORDER,
        encoders=encoders,
        script=Markup(_part("report.js")),
        style=Markup(_part("report.css")),
    )


def _environment() -> jinja2.Environment:
    """Jinja that escapes every value that it prints: documents are anybody's text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=tables.number, percent=tables.percent, probability=tables.probability, spoken=behaviours.spoken, rgb=rgb
    )
    return environment


def _part(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def rgb(colour: str) -> str:
    """ "#D55E00" -> "213,94,0", for colours with an opacity."""
    return ",".join(str(int(colour[start : start + 2], 16)) for start in (1, 3, 5))
