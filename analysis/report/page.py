"""The page of a report: templates, cards within its size, and where its numbers come from."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from analysis import tables
from analysis.config import AnalysisSettings
from analysis.damage import readable
from analysis.report import behaviours, figures
from analysis.report.cards import Card, anchor_of
from analysis.report.pairs import Pair
from analysis.report.payload import Payload, payload_of
from extract.config import split_member
from extract.manifest import provenance

# Bytes of what stands around cards only where there are some: filters and notes.
WITH_CARDS = 6000


@dataclass(frozen=True)
class Read:
    """One step of the analysis with the files that it read, as its record says."""

    step: str
    record: str
    inputs: dict[str, str]


def render(settings: AnalysisSettings, pairs: list[Pair], context: dict[str, Any], colours: dict[str, str]) -> str:
    """The page, `context` being what the sections show. Its size is at most `analysis.report.max_megabytes`, unless
    the figures and tables alone are more, which it says.
    """
    config = settings.analysis.report
    cards = in_order(pairs)
    first = {anchor_of(row.pair, row.latent) for row in context["measured"] if row.found and row.latent is not None}
    shown = _shown(settings, pairs, cards, colours) | context
    template = _environment().get_template("report.html.j2")

    def page(payload: Payload) -> str:
        return template.render(**shown, payload=payload, cards=Markup(payload.text))

    def colour_of(owner: str) -> str:
        return rgb(shown["colours"][owner])

    empty = len(page(payload_of([], set(), colour_of, 0)).encode("utf-8", errors="backslashreplace"))
    budget = int(config.max_megabytes * 1e6) - empty - WITH_CARDS
    if budget < 0:
        shown["oversize"] = empty / 1e6
        print(
            f"report: without any card the page is {empty / 1e6:.1f} MB, more than "
            f"analysis.report.max_megabytes={config.max_megabytes:g}. Raise it to have cards."
        )
    return page(payload_of(cards, first, colour_of, budget))


def _shown(settings: AnalysisSettings, pairs: list[Pair], cards: list[Card], colours: dict[str, str]) -> dict[str, Any]:
    """What every section may use besides its own context."""
    script, style = _part("report.js"), _part("report.css")
    return {
        "title": settings.analysis.report.title or f"What tuning changed: {settings.study}",
        "settings": settings,
        "pairs": pairs,
        "num_models": max(len(pair.models) for pair in pairs),
        "anchors": {card.anchor for card in cards},
        "num_by_hand": sum(card.human is not None for card in cards),
        "anchor_of": anchor_of,
        "split_member": split_member,
        "colours": {owner: figures.INK for pair in pairs for owner in pair.num_own} | colours,
        "annotator": "; ".join(sorted({card.annotator for card in cards})) or "none",
        "files_of": lambda name: [f"../analysis/{pair.name}/{name}" for pair in pairs],
        "runs_of": lambda name: [f"../runs/{pair.name}/{name}" for pair in pairs if pair.curves],
        "provenance": provenance(),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": Markup(style),
        "oversize": None,
    }


def in_order(pairs: list[Pair]) -> list[Card]:
    """All cards, the most exclusive first; those of the bases, which tuning lost and did not add, after the others."""
    bases = {pair.name: pair.models[0] for pair in pairs}
    cards = [card for pair in pairs for card in pair.cards]
    return sorted(cards, key=lambda c: (c.owner == bases[c.pair], abs(c.nu_error) + abs(c.nu_reconstruction)))


def records_of(folders: list[Path]) -> list[Read]:
    """The records of the finished steps of analysis folders."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
            with readable(path):
                record = json.loads(path.read_bytes())
                if {"step", "inputs"} <= set(record):
                    found.append(Read(record["step"], f"../analysis/{folder.name}/{path.name}", record["inputs"]))
    return found


def _environment() -> jinja2.Environment:
    """Jinja that escapes every value that it prints: documents are anybody's text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=tables.number,
        bounded=tables.bounded,
        percent=tables.percent,
        spoken=behaviours.spoken,
        rgb=rgb,
        public=public,
        file_name=lambda path: Path(path).name,
    )
    return environment


def public(name: str) -> str:
    """The name of a model as others know it; of a model in a folder, the folder's name alone."""
    return Path(name).name if name.startswith(("/", ".", "~")) or Path(name).is_dir() else name


def _part(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def rgb(colour: str) -> str:
    """ "#D55E00" -> "213,94,0", for colours with an opacity."""
    return ",".join(str(int(colour[start : start + 2], 16)) for start in (1, 3, 5))
