"""The local page: the sections of W&B's workspace, drawn from files, in one HTML file that needs no network.

The page draws a figure when it is scrolled to, with the runs that are chosen; how is in `dashboard.html.j2`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import jinja2
from plotly.colors import qualitative
from plotly.offline import get_plotlyjs

from extract.errors import BadInput
from train.dashboard_curves import RunLog, points_each, read_run
from train.dashboard_figures import Figure, owners_figure, panel_figure, relation_figure
from train.dashboard_panels import RELATIONS, SECTIONS, panels_of

# Of more runs, those that were written last are chosen until the reader chooses.
MAX_CHOSEN = 12
COLOURS = [*qualitative.D3, *qualitative.Dark2, *qualitative.Set2]
REPORT, OWNERS = Path("report/index.html"), Path("report/tables/owners.csv")
# Sections of what is logged beside the runs, and the folders that hold it.
BESIDE = {"Tokens": "tokens", "Extraction": "extraction"}
# Why a section has no figure.
EMPTY = {
    "Sweep": "Shows runs that differ in a setting or in L0, once two of them were validated.",
    **{section: f"There is no {folder}/metrics.jsonl here." for section, folder in BESIDE.items()},
    "Analysis": "There is no report yet: python -m analysis writes it.",
}


def read_logs(outputs: Path, pair: str | None, max_points: int) -> tuple[list[RunLog], list[RunLog]]:
    """The runs of a pair, or all, sorted by name, and what extraction has logged. BadInput without either."""
    folders = sorted((path for path in (outputs / "runs").glob("*") if path.is_dir()), key=_order)
    chosen = [folder for folder in folders if pair in (None, folder.name.split(",")[0])]
    extractions = [outputs / name for name in BESIDE.values() if (outputs / name / "metrics.jsonl").is_file()]
    if not chosen and not extractions:
        which = f" of {pair}" if pair else ""
        raise BadInput(
            f"There are no runs{which} in {outputs / 'runs'}. Train first, or name the folder that the study wrote to: "
            "outputs=FOLDER."
        )
    num_points = points_each(max_points, len(chosen) + len(extractions))
    runs, extracted = ([read_run(path.name, path, num_points) for path in paths] for paths in (chosen, extractions))
    return runs, extracted


def _order(folder: Path) -> tuple[list[str | float], str]:
    """By name, numbers by their size: k=5 before k=10."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)", folder.name)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)], folder.name


def page_of(study: str, outputs: Path, folder: Path, runs: Sequence[RunLog], extracted: Sequence[RunLog]) -> str:
    """The page as text, to lie in `folder`."""
    newest = sorted(range(len(runs)), key=lambda number: -runs[number].written)[:MAX_CHOSEN]
    rows = [
        {"name": run.name, "state": state_of(run), "colour": COLOURS[i % len(COLOURS)], "chosen": i in newest}
        for i, run in enumerate(runs)
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("dashboard.html.j2").render(
        study=study,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=rows,
        sections=_sections(outputs, runs, extracted),
        notes=notes_on([*runs, *extracted], len(newest), len(runs)),
        report=quote(os.path.relpath(outputs / REPORT, folder)) if (outputs / REPORT).is_file() else None,
        plotly=get_plotlyjs(),
    )


def _sections(outputs: Path, runs: Sequence[RunLog], extracted: Sequence[RunLog]) -> list[dict[str, object]]:
    """Sections by name, with their figures that show anything; of the others, why."""
    own = {
        "Sweep": [relation_figure(relation, runs) for relation in RELATIONS],
        **{name: [panel_figure(p, extracted) | {"always": True} for p in panels_of(name)] for name in BESIDE},
        "Analysis": [owners_figure(outputs / OWNERS)],
    }
    sections = list[dict[str, object]]()
    for name in SECTIONS:
        figures: list[Figure] = own.get(name) or [panel_figure(panel, runs) for panel in panels_of(name)]
        shown = [figure for figure in figures if figure["data"]]
        sections.append({"name": name, "figures": shown, "empty": EMPTY.get(name, "Nothing was logged yet.")})
    return sections


def state_of(run: RunLog) -> str:
    """How far a run is."""
    if not run.curves:
        return "nothing logged yet"
    of = f" of {run.num_steps:,}" if run.num_steps else ""
    return f"step {run.last_step:,.0f}{of}"


def notes_on(logs: Sequence[RunLog], num_chosen: int, num_runs: int) -> list[str]:
    """What a reader has to know about what is not shown."""
    notes = []
    if num_chosen < num_runs:
        notes.append(f"Of {num_runs} runs, the {num_chosen} that were written last are chosen at first.")
    thinned = [(len(c.steps), c.num_logged) for log in logs for c in log.curves.values() if len(c.steps) < c.num_logged]
    if thinned:
        shown, logged = max(thinned, key=lambda pair: pair[1])
        notes.append(
            f"Long curves show the smallest and the largest value of each stretch alone (the longest {shown:,} of "
            f"{logged:,} values): max_points=NUMBER shows more."
        )
    for log in logs:
        if log.num_damaged:
            notes.append(f"{log.name}: {log.num_damaged} lines could not be read and were left out.")
    return notes
