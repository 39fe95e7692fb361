"""Figures for papers: journal width, colour-blind safe (Okabe & Ito), one colour per model throughout.

Figures of one or two columns of a journal page (89 or 183 mm) with text of 7 and 8 points, embedded as TrueType.
`draw` publishes a figure as PDF and PNG and gives it to the page as SVG.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from extract.publish import publish, publishing

BASE_COLOUR = "#0072B2"
TUNED_COLOURS = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
GREY, INK = "#8a8a8a", "#222222"
# Inches: two columns of a journal page, and one.
WIDTH, COLUMN = 183 / 25.4, 89 / 25.4
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "crossdiff",
}
# Larger on the screen than in print, where 7 points are read more easily.
SCREEN_DPI = 120
# The same figure twice gives the same bytes.
NO_DATE: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


@dataclass(frozen=True)
class Drawn:
    """A figure that lies in the report's folder: its name without ending, the page's copy as a data URI, its width
    there in pixels, the files that its numbers come from, relative to the page, and its caption for a paper, which lies
    beside it as text.
    """

    name: str
    uri: str
    width: int
    sources: list[str]
    caption: str


def model_colours(pairs: list[list[str]]) -> dict[str, str]:
    """One colour per model: blue for models that are only ever a base, others in order of appearance."""
    tuned = list(dict.fromkeys(model for pair in pairs for model in pair[1:]))
    colours = {model: TUNED_COLOURS[index % len(TUNED_COLOURS)] for index, model in enumerate(tuned)}
    return {model: colours.get(model, BASE_COLOUR) for pair in pairs for model in pair}


def brief(name: str, length: int = 14) -> str:
    """A name within `length` characters: its middle goes, since members of one model differ at the end."""
    if len(name) <= length:
        return name
    end = length // 2
    return f"{name[: length - end - 1]}…{name[-end:]}"


def draw(figure: Figure, folder: Path, name: str, sources: list[str], caption: str) -> Drawn:
    """Save a figure for papers and its caption in the folder `figures` of a report and return it for the page."""
    save(figure, folder / "figures", name)
    publish(folder / "figures" / f"{name}.txt", f"{caption}\n".encode("utf-8", errors="backslashreplace"))
    width = round(figure.get_figwidth() * SCREEN_DPI)
    return Drawn(name, "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode(), width, sources, caption)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Publish `<name>.pdf` and `<name>.png` (300 dpi) in `folder`."""
    for kind in ("pdf", "png"):
        with matplotlib.rc_context(STYLE), publishing(folder / f"{name}.{kind}") as file:
            figure.savefig(file, format=kind, dpi=300, metadata=NO_DATE[kind])


def svg(figure: Figure) -> bytes:
    """The figure as SVG with text as outlines; dense points are an embedded image."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=200, metadata=NO_DATE["svg"])
    return buffer.getvalue()
