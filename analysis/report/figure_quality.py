"""Figures of the annotation: the flow of latents through it, how well descriptions score, how far raters agree.

Each draws a table as `side_tables.read_table` reads it: values are text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.compare.flow import KEPT
from analysis.report.figures import COLUMN, GREY, INK, STYLE, WIDTH, brief
from analysis.tables import Table
from analysis.taxonomy.categories import OTHER

IN_OTHER = "#cfcfcf"
LOSSES = ["#4d4d4d", "#8a8a8a", "#6b6b6b", "#a8a8a8", "#333333"]

# Captions, which say what a reader of the figure alone has to know.
FLOW_CAPTION = (
    "Latents of each model from the selection to a category: at each stage those that went on in the model's colour, "
    "then those in “other” and those that were lost, named behind the bar with their outcome."
)
SCORES_CAPTION = (
    "Balanced accuracy of telling documents in which a latent fires from others by its description alone, mean over "
    "the latents of a model (their number in brackets) with its bootstrap interval over latents. Hollow: descriptions "
    "shuffled between latents; dashed: chance."
)
AGREEMENT_CAPTION = (
    "Agreement on categories and classes beyond chance, Krippendorff's α and Cohen's κ, with bootstrap intervals over "
    "latents; dashed: as by chance; 1: complete."
)

Record = dict[str, str]


def records(table: Table) -> list[Record]:
    """The rows of a table by column."""
    return [dict(zip(table.columns, map(str, row), strict=True)) for row in table.raw]


def flow(table: Table, model_colours: Mapping[str, str]) -> Figure:
    """Latents of each model by stage (selected, annotated, categorised): those that went on in the model's colour, then
    `other` and losses in greys, which are named behind the bar.
    """
    rows = records(table)
    stages = list(dict.fromkeys((row["pair"], row["model"], row["stage"]) for row in rows))
    places = [number + 0.6 * len({stage[:2] for stage in stages[: number + 1]}) for number in range(len(stages))]
    losses = dict.fromkeys(row["outcome"] for row in rows if int(row["count"]) and row["outcome"] not in KEPT)
    greys = {OTHER: IN_OTHER} | dict(zip(losses, cycle(LOSSES), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.17 * max([*places, 2])), layout="constrained")
        axes = figure.subplots()
        for place, stage in zip(places, stages, strict=True):
            own = model_colours.get(stage[1], INK)
            _flow_bar(axes, place, [row for row in rows if _stage(row) == stage], dict.fromkeys(KEPT, own) | greys)
        axes.set_yticks(places, [_stage_name(stages, place) for place in range(len(stages))])
        axes.invert_yaxis()
        axes.margins(x=0.3)  # what is lost is named behind the bars
        axes.set(xlabel="latents")
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        shown = {row["outcome"] for row in rows if int(row["count"])}
        handles = [Patch(color=INK, label="went on (in the model's colour)")]
        handles += [Patch(color=colour, label=outcome) for outcome, colour in greys.items() if outcome in shown]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0.2)
        return figure


def _stage(row: Record) -> tuple[str, str, str]:
    return row["pair"], row["model"], row["stage"]


def _stage_name(stages: list[tuple[str, str, str]], place: int) -> str:
    """The stage, and where it is a model's first the model."""
    pair, model, stage = stages[place]
    is_first = place == 0 or stages[place - 1][:2] != (pair, model)
    return f"{brief(model, 20)} ({brief(pair, 24)}) · {stage}" if is_first else stage


def _flow_bar(axes: Axes, place: float, rows: list[Record], colours: dict[str, str]) -> None:
    """What went on, then `other`, then losses; behind the bar how many went on and what became of the others."""
    start, first, said = 0, list(colours), []
    for row in sorted(
        rows, key=lambda row: (row["outcome"] not in KEPT, row["outcome"] == OTHER, first.index(row["outcome"]))
    ):
        count = int(row["count"])
        if count:
            axes.barh(place, count, left=start, height=0.8, color=colours[row["outcome"]])
            is_named = row["outcome"] not in KEPT or row["outcome"] == OTHER
            said.append(f"{count:,} {row['outcome']}" if is_named else f"{count:,}")
            start += count
    text = ", ".join(said) or "0"
    axes.annotate(text, (start, place), (3, 0), textcoords="offset points", va="center", color=INK, fontsize=7)


def scores(table: Table, model_colours: Mapping[str, str]) -> Figure:
    """Balanced accuracy with intervals by kind and owner, in its colour; the control hollow; chance as a line."""
    rows = [row for row in records(table) if _number(row["balanced_accuracy"]) is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 0.7 + 0.2 * max(len(rows), 2)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            is_control = row["control"] not in ("", "none")
            colour = GREY if is_control else model_colours.get(row["owner"], INK)
            _interval(axes, place, row, "balanced_accuracy", colour, is_control)
        names = [
            f"{brief(row['owner'])}, {row['kind']}{_control(row['control'])} ({row['num_latents']})" for row in rows
        ]
        axes.axvline(0.5, color=GREY, linewidth=0.6, linestyle=(0, (3, 3)))
        _rows(axes, names)
        axes.set(xlabel="balanced accuracy", xlim=(min(0.4, *axes.get_xlim()), 1))
        return figure


def _control(control: str) -> str:
    return "" if control in ("", "none") else f", {control}"


def agreement(table: Table) -> Figure:
    """Coefficients of agreement with intervals, by measure, level and who is compared; 0 is chance."""
    rows = [row for row in records(table) if _number(row["value"]) is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.2 * max(len(rows), 2)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            _interval(axes, place, row, "value", INK, False)
        measure = {"krippendorff_alpha": "α", "cohen_kappa": "κ"}
        names = [
            f"{measure.get(row['measure'], row['measure'])}, {brief(row['between'], 60)}, {row['level']}"
            for row in rows
        ]
        axes.axvline(0, color=GREY, linewidth=0.6, linestyle=(0, (3, 3)))
        _rows(axes, names)
        axes.set(xlabel="agreement (0: as by chance, 1: complete)", xlim=(min(-0.05, axes.get_xlim()[0]), 1))
        return figure


def _interval(axes: Axes, place: int, row: Record, name: str, colour: str, hollow: bool) -> None:
    """A point with its interval, where it has one."""
    low, high = _number(row["low"]), _number(row["high"])
    if low is not None and high is not None:
        axes.hlines(place, low, high, color=colour, linewidth=1)
    fill = "white" if hollow else colour
    axes.plot(float(row[name]), place, "o", color=colour, markersize=3.5, markerfacecolor=fill, clip_on=False)


def _rows(axes: Axes, names: list[str]) -> None:
    """Names of the rows from above."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 2) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _number(text: str) -> float | None:
    """A finite number, None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
