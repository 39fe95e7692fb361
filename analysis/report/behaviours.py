"""The answer of the report: for which behaviours each tuned model has a latent of its own, and which were misplaced."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from analysis.latents.columns import AND, members_of
from analysis.tables import Table, bounded
from extract.config import split_member

FOUND, ADDED, MISSED, SHARED = "found", "added", "missed", "shared behaviour"
WRONG, UNTUNED, ABSENT, NOT_FOUND = "wrong model", "untuned model", "absent", "not found"
VERDICTS = {
    FOUND: "known to have been tuned into this model and not into the other, and found",
    ADDED: "a latent of this model predicts it (what was tuned in is not known to the report)",
    MISSED: "known to have been tuned into this model alone, but no latent of its own predicts it well enough",
    SHARED: "known to have been tuned into this model and another of its crosscoder; a latent of this model alone "
    "predicts it, perhaps because the models learned it in different ways",
    WRONG: "a latent of this model predicts it, although it was not tuned into this model",
    UNTUNED: "a latent that only this model has, which was taught nothing, predicts it: tuning did not add it",
    ABSENT: "tuning does not set the model apart by it, and rightly nothing was found",
    NOT_FOUND: "no latent of this model predicts it well enough",
}


@dataclass(frozen=True)
class Measured:
    """One row of `tags.csv` with its pair and verdict. `latent` is None, and measures nan, without any candidate.

    `certain` says that the interval of F1 does not hold the threshold of what counts as found.
    """

    pair: str
    tag: str
    value: str
    owner: str
    latent: int | None
    f1: float
    f1_low: float
    f1_high: float
    auroc: float
    auroc_low: float
    auroc_high: float
    num_positive: int
    num_negative: int
    num_positive_prompts: int
    num_negative_prompts: int
    found: bool
    certain: bool
    verdict: str

    @property
    def size(self) -> str:
        """What it was measured on: "9 prompts with it, 27 of 1,180 documents"."""
        total = self.num_positive + self.num_negative
        return f"{self.num_positive_prompts:,} prompts with it, {self.num_positive:,} of {total:,} documents"


@dataclass(frozen=True)
class Column:
    """One tuned model in one pair: a column of the answer."""

    pair: str
    owner: str


def read_measured(folder: Path, models: list[str], planted: dict[str, list[str]], min_f1: float) -> list[Measured]:
    """The rows of `tags.csv`; `planted` names the models that a behaviour is known to have been tuned into, `min_f1` is
    the threshold of what counts as found.
    """
    with (folder / "tags.csv").open(encoding="utf-8", newline="") as file:
        return [_measured(folder.name, row, models, planted, min_f1) for row in csv.DictReader(file)]


def _measured(
    pair: str, row: dict[str, str], models: list[str], planted: dict[str, list[str]], min_f1: float
) -> Measured:
    found = row["found"] == "True"
    return Measured(
        pair=pair,
        tag=row["tag"],
        value=row["value"],
        owner=row["owner"],
        latent=int(float(row["latent"])) if row["latent"] else None,
        f1=float(row["f1"]),
        f1_low=float(row["f1_low"]),
        f1_high=float(row["f1_high"]),
        auroc=float(row["auroc"]),
        auroc_low=float(row["auroc_low"]),
        auroc_high=float(row["auroc_high"]),
        num_positive=int(row["num_positive"]),
        num_negative=int(row["num_negative"]),
        num_positive_prompts=int(row["num_positive_prompts"]),
        num_negative_prompts=int(row["num_negative_prompts"]),
        found=found,
        certain=not float(row["f1_low"]) < min_f1 <= float(row["f1_high"]),
        verdict=verdict(found, row["value"], row["owner"], models, planted),
    )


def verdict(found: bool, value: str, owner: str, models: list[str], planted: dict[str, list[str]]) -> str:
    """What a row means, by what is known of the tuning. Of an owner that is several models, all were taught together.

    A behaviour of several models of a pair need not have a latent of one alone; if it has, that model learned it in a
    way of its own, which is no misattribution.
    """
    if value not in planted:
        return ADDED if found else NOT_FOUND
    taught = [member for member in models if split_member(member)[0] in planted[value]]
    owners = members_of(owner, models)
    if taught == owners:
        return FOUND if found else MISSED
    if not found:
        return ABSENT
    if set(owners) < set(taught):
        return SHARED
    carriers = {carrier for names in planted.values() for carrier in names}
    return WRONG if any(split_member(member)[0] in carriers for member in owners) else UNTUNED


def columns_of(pairs: dict[str, list[str]]) -> list[Column]:
    """The tuned models of all pairs: every member that is the tuned one somewhere; a plain base has no column."""
    tuned = {model for models in pairs.values() for model in models[1:]}
    return [Column(pair, model) for pair, models in pairs.items() for model in models if model in tuned]


def answers(measured: list[Measured], columns: list[Column]) -> list[str]:
    """One sentence for each tuned model: what was found, what was missed, what was misplaced."""
    return [
        _answer(column, [row for row in measured if (row.pair, row.owner) == (column.pair, column.owner)])
        for column in columns
    ]


def _answer(column: Column, rows: list[Measured]) -> str:
    known = any(row.verdict in (FOUND, MISSED, SHARED, WRONG, ABSENT) for row in rows)
    found = [row for row in rows if row.verdict == (FOUND if known else ADDED)]
    of = f" of {sum(row.verdict in (FOUND, MISSED) for row in rows)} planted" if known else ""
    named = _named(sorted(found, key=lambda row: -row.f1))
    parts = [f"{len(found)}{of} behaviours have a latent of {column.owner} alone" + (f": {named}" if found else "")]
    missed, added, shared, wrong = (
        _named([row for row in rows if row.verdict == verdict]) for verdict in (MISSED, ADDED, SHARED, WRONG)
    )
    parts += [f"missed: {missed}"] if missed else []
    parts += [f"not known to be planted: {added}"] if added and known else []
    parts += [f"shared behaviours with a latent of {column.owner} alone: {shared}"] if shared else []
    parts += [f"wrong-model attributions: {wrong or 'none'}"] if known else []
    return "; ".join(parts) + "."


def _named(rows: list[Measured]) -> str:
    return ", ".join(
        f"{spoken(row.value)} (F1 {bounded(row.f1)}{'' if row.certain else ', not certain'})" for row in rows
    )


def misplaced_in_base(measured: list[Measured], columns: list[Column]) -> list[Measured]:
    """Behaviours that a latent of the untuned model predicts well: not something that tuning added."""
    shown = {(column.pair, column.owner) for column in columns}
    return [row for row in measured if row.found and AND not in row.owner and (row.pair, row.owner) not in shown]


def of_several(measured: list[Measured]) -> list[Measured]:
    """Behaviours that a latent of several models, but not all, predicts well."""
    return [row for row in measured if row.found and AND in row.owner]


def spoken(value: str) -> str:
    """A tag's value as words."""
    return value.replace("_", " ")


def table_of(measured: list[Measured]) -> Table:
    """All measured behaviours, base models included."""
    columns = ["pair", "tag", "value", "owner", "latent", "f1", "f1_low", "f1_high", "auroc", "auroc_low", "auroc_high"]
    columns += ["num_positive", "num_negative", "num_positive_prompts", "num_negative_prompts"]
    columns += ["found", "certain", "verdict"]
    return Table(
        name="behaviours",
        caption="How well the best latent of each model predicts a behaviour, on prompts that it was not chosen on; n: "
        "prompts with the behaviour, documents that answer them (answers of all models), and all documents. Intervals "
        "are those of a bootstrap over prompts, widened to what further prompts, all right or all wrong, would make of "
        "the measure, as many as Wilson's interval adds.",
        columns=columns,
        raw=[[getattr(row, column) for column in columns] for row in measured],
        heading=["behaviour", "pair", "model", "latent", "n", "F1", "interval", "AUROC", "interval", "verdict"],
        printed=[
            [
                spoken(row.value),
                row.pair,
                row.owner,
                "–" if row.latent is None else str(row.latent),
                f"{row.num_positive_prompts:,} · {row.num_positive:,} · {row.num_positive + row.num_negative:,}",
                bounded(row.f1),
                plain_interval(row.f1_low, row.f1_high),
                bounded(row.auroc, 3),
                plain_interval(row.auroc_low, row.auroc_high, 3),
                row.verdict,
            ]
            for row in measured
        ],
    )


def plain_interval(low: float, high: float, digits: int = 2) -> str:
    """ "[0.91, 0.98]" """
    return f"[{bounded(low, digits)}, {bounded(high, digits)}]"
