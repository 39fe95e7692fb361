"""python -m analysis.sweep experiment=STUDY[/PAIR]: the runs of a sweep side by side, in one table and one figure.

Unfinished and failed runs are rows that say so. Latents of one model are counted by `python -m analysis` where it was
run, and besides from decoder norms alone. Writes sweep.{csv,tex,txt} in report/tables and sweep.{pdf,png,txt} in
report/figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from analysis import tables
    from analysis.config import AnalysisSettings
    from analysis.report import figures
    from analysis.sweep_rows import Row, block_order, rows_of
    from extract.command import run
    from extract.publish import publish

LAYER, K = "hookpoint", "crosscoder.k"
CAPTION = (
    "Finished runs of a sweep. Variance explained of held-out tokens (mean over the models) and latents that belong to "
    "one tuned model alone, against L0, the mean number of active latents; lines join runs that differ in k, or in the "
    "layer, alone. Latents are counted by the thresholds that each run was analysed with; hollow, where no run is: "
    "candidates by the norms of the decoder."
)
COLOURS = [figures.BASE_COLOUR, *figures.TUNED_COLOURS]


def main(settings: AnalysisSettings) -> None:
    """Writes the table and the figure, and prints the table."""
    rows, folder = rows_of(settings), Path(settings.outputs) / "report"
    table = table_of(rows)
    tables.write_table(table, folder / "tables")
    publish(folder / "tables" / "sweep.txt", (tables.text_of(table) + "\n").encode())
    figures.save(figure_of(rows), folder / "figures", "sweep")
    publish(folder / "figures" / "sweep.txt", f"{CAPTION}\n".encode())
    print(tables.text_of(table))
    print(f"{sum(row.is_finished for row in rows)} of {len(rows)} runs are finished")
    print(f"table: {folder / 'tables' / 'sweep.csv'}\nfigure: {folder / 'figures' / 'sweep.pdf'}")


def varied(rows: list[Row]) -> list[str]:
    """The settings that are not the same in all runs, and layer and k in any case."""
    names = {name for row in rows for name in row.settings} - {LAYER, K}
    different = [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1]
    return [LAYER, K, *sorted(different)]


def table_of(rows: list[Row]) -> tables.Table:
    """One row a run."""
    settings = varied(rows)
    models = list(dict.fromkeys(model for row in rows for model in row.variance_explained))
    columns = ["run", "state", *settings, "l0", "variance_explained"]
    columns += [f"{name}_{model}" for model in models for name in ("variance_explained", "own", "own_by_norms")]
    heading = ["pair", *(name.rpartition(".")[2] for name in settings), "L0", "variance explained"]
    heading += [f"{model}: {name}" for model in models for name in ("explained", "own", "own by norms")]
    return tables.Table(
        "sweep",
        "Runs of a sweep: L0 and variance explained of held-out tokens; latents of one model alone as analysed, and by "
        "decoder norms alone (candidates, dead ones among them).",
        columns,
        [_raw(row, settings, models) for row in rows],
        [*heading, "state"],
        [_printed(row, settings, models) for row in rows],
    )


def _raw(row: Row, settings: list[str], models: list[str]) -> list[tables.Value]:
    values = [str(row.settings.get(name)) for name in settings]
    each = [(row.variance_explained.get(m), row.own.get(m), row.own_by_norms.get(m)) for m in models]
    return [
        row.name,
        row.state,
        *values,
        *map(_known, (row.l0, row.mean_explained)),
        *(v for triple in each for v in triple),
    ]


def _printed(row: Row, settings: list[str], models: list[str]) -> list[str]:
    values = [_text(row.settings.get(name)) for name in settings]
    cells = [row.pair, *values, tables.number(row.l0, 1), tables.number(row.mean_explained, 3)]
    for model in models:
        cells.append(tables.number(row.variance_explained.get(model, math.nan), 3))
        cells += [str(found.get(model, "–")) for found in (row.own, row.own_by_norms)]
    return [*cells, row.state]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def figure_of(rows: list[Row]) -> Figure:
    """Variance explained against L0 and, where it varies, against the layer; latents of tuned models against L0: those
    of analysed runs, or where no run is, hollow, the candidates by decoder norms. A line joins the finished runs that
    differ in k alone, or in the layer alone.
    """
    finished = [row for row in rows if row.is_finished]
    layers = sorted({row.settings[LAYER] for row in finished}, key=block_order)
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.6), layout="constrained")
        panels = list(figure.subplots(1, 3 if len(layers) > 1 else 2))
        _lines(panels[0], finished, K, lambda row: row.l0, lambda row: row.mean_explained)
        panels[0].set(title="Variance explained (held-out)", xlabel="L0")
        if len(layers) > 1:
            place = {layer: number for number, layer in enumerate(layers)}
            _lines(panels[1], finished, LAYER, lambda row: place[row.settings[LAYER]], lambda row: row.mean_explained)
            panels[1].set(title="Variance explained (held-out)", xlabel="layer")
            panels[1].set_xticks(range(len(layers)), layers)
        for axes in panels[:-1]:
            if labels := axes.get_legend_handles_labels()[1]:
                axes.legend(handlelength=1, fontsize=7 if len(labels) < 6 else 5)
        _own_latents(panels[-1], finished)
        return figure


def _own_latents(axes: Axes, rows: list[Row]) -> None:
    num_analysed = sum(bool(row.own) for row in rows)
    if num_analysed:
        _lines(axes, rows, K, lambda row: row.l0, lambda row: row.num_own)
    else:
        _lines(axes, rows, K, lambda row: row.l0, lambda row: row.num_own_by_norms, hollow=True)
    counted = f"{num_analysed} of {len(rows)} analysed" if num_analysed else "candidates by norms, none analysed"
    axes.set(title="Latents of tuned models", xlabel=f"L0   ({counted})")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _lines(
    axes: Axes, rows: list[Row], along: str, x: Callable[[Row], float], y: Callable[[Row], float], hollow: bool = False
) -> None:
    """A line for each group of runs that agree in all settings but `along`, named by what its group differs in from
    the others; without the runs of which `y` is NaN.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    others = [name for name in varied(rows) if name != along]
    for row in rows:
        groups.setdefault((row.pair, *(str(row.settings.get(name)) for name in others)), []).append(row)
    constant = [len(set(column)) == 1 for column in zip(*groups, strict=True)]
    for group, colour in zip(groups.values(), cycle(COLOURS), strict=False):
        names = [group[0].pair, *(f"{name.rpartition('.')[2]}={_text(group[0].settings.get(name))}" for name in others)]
        label = ", ".join(name for name, same in zip(names, constant, strict=True) if not same)
        points = sorted((x(row), y(row)) for row in group if not math.isnan(y(row)))
        places, values = [place for place, _ in points], [value for _, value in points]
        face = "white" if hollow else colour
        axes.plot(places, values, "o-", color=colour, markersize=3.5, markerfacecolor=face, label=label)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(AnalysisSettings, main)
