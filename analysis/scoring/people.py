"""Agreement with people: what they are shown, blind to models and annotators, and what they said.

    unit=latents    documents of a latent with marked tokens: which category?
    unit=documents  a description and one document of a detection question: does the latent fire in it?

outputs/STUDY/analysis/people/UNIT/<sheet>.<hash>.key.csv    which id stands for what
outputs/STUDY/analysis/people/UNIT/<who>.csv                 what a person said: of which unit, and the answer
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.annotate.annotations import Annotation
from analysis.config import AgreementConfig
from analysis.examples.database import Example, read_examples, reading
from analysis.examples.excerpts import Span, spans_of
from analysis.scoring.sheets import KEY, Filled, Named, as_csv, sample, write_sheet
from analysis.taxonomy.categories import OTHER, Category
from extract.publish import publish

LATENTS, DOCUMENTS = "latents", "documents"
# The column that people fill in.
ANSWERS = {LATENTS: "category", DOCUMENTS: "active"}
YES, NO = "yes", "no"
FIRED = "«{}»"


def known_answers(unit: str, categories: Sequence[Category]) -> dict[str, str]:
    """The answers that there are by their casefolded spellings."""
    if unit == DOCUMENTS:
        return {"yes": YES, "y": YES, "true": YES, "1": YES, "no": NO, "n": NO, "false": NO, "0": NO}
    return {name.casefold(): name for name in [*(category.name for category in categories), OTHER]}


def export_latents(
    sheet: Path,
    keys: Path,
    latents: Sequence[Named],
    analyses: Path,
    categories: Sequence[Category],
    config: AgreementConfig,
) -> int:
    """Writes the sheet of a random sample of latents (pair, number) and its key; returns its size.

    A row holds an id and documents with the firing tokens in «»: no model, no label, no description, no category. The
    names of the categories go into <sheet>.categories.csv.
    """
    key = sample(latents, config.sample_size, config.seed)
    header = [f"document_{number}" for number in range(1, config.documents_per_latent + 1)]
    rows = {identity: documents_of(analyses / pair, int(latent), config) for identity, (pair, latent) in key.items()}
    padded = {identity: texts + [""] * (len(header) - len(texts)) for identity, texts in rows.items()}
    names = [[category.name, category.group, category.description] for category in categories]
    names.append([OTHER, OTHER, "None of the above."])
    write_sheet(sheet, ANSWERS[LATENTS], header, padded, keys, key)
    publish(sheet.with_suffix(".categories.csv"), as_csv(["category", "class", "description"], names))
    return len(key)


def documents_of(folder: Path, latent: int, config: AgreementConfig) -> list[str]:
    """The top documents of a latent around their strongest activation."""
    with reading(folder) as database:
        examples = read_examples(database, latent, config.documents_per_latent)
    return [quoted(example, config.context_tokens) for example in examples]


def quoted(example: Example, context_tokens: int) -> str:
    """A document around its strongest activation in quotes, with which no spreadsheet takes it for a formula."""
    return f"“{marked(spans_of(example, context_tokens))}”"


def marked(spans: Iterable[Span]) -> str:
    """Text with every run of firing tokens between « and »."""
    parts = [FIRED.format(span.text) if span.kind == "fired" else span.text for span in spans]
    return "".join(parts).replace("»«", "")


def told(annotation: Annotation) -> str:
    """A description as people read it, in quotes too."""
    parts = [annotation.label, annotation.pattern, annotation.description]
    return f"“{' – '.join(part for part in parts if part)}”"


def add_said(path: Path, filled: Iterable[Filled]) -> int:
    """Adds what one person said to what this person said before; returns of how many units that is an answer.

    The newest answer of a unit counts; where a cell is left empty, an earlier answer stays.
    """
    before = _read_said(path) if path.exists() else {}
    said = before | {row.named: row.answer or before.get(row.named) for row in filled}
    names = [f"part_{number}" for number in range(1, len(next(iter(said))) + 1)]
    publish(path, as_csv([*names, "answer"], [[*named, answer or ""] for named, answer in said.items()]))
    return sum(answer is not None for answer in said.values())


def _read_said(path: Path) -> dict[Named, str | None]:
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(named): answer or None for *named, answer in list(csv.reader(file))[1:]}


def read_said(folder: Path) -> dict[str, dict[Named, str | None]]:
    """What every person said of each unit, by the person's name; `folder` is that of the unit."""
    return {path.stem: _read_said(path) for path in answers_in(folder)}


def answers_in(folder: Path) -> list[Path]:
    """The files of what people said, a person's each; `folder` is that of the unit."""
    return [path for path in sorted(folder.glob("*.csv")) if not path.name.endswith(KEY)]
