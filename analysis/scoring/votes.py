"""Who put which latent into which category, and how far they agree, at the level of categories and of classes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from analysis.scoring.raters import Agreement, Bootstrap, cohen, krippendorff
from analysis.taxonomy.categories import read_categories

ALPHA, KAPPA = "krippendorff_alpha", "cohen_kappa"
# Behind the name of a rater that is set against a person, or several.
AND_PEOPLE = " and people"

# A latent of a pair; anything that raters judge; what one rater made of each of them, None where it gave no answer.
Key = tuple[str, int]
Unit = TypeVar("Unit")
Rater = Mapping[Unit, str | None]


@dataclass(frozen=True)
class AgreementRow:
    """One line of `agreement.csv`: how far raters agree at one level, with the interval over groups of near-duplicates.

    `between` is "repeats" (of the first annotator), "repeats of <annotator>", "<annotator> and <annotator>", "annotator
    and people" (the first annotator and one person), "annotator and people: <who>" where there are several, or "people"
    (among themselves). At the level "document" the judge of detection takes the annotator's place, and `num_latents`
    counts documents. Numbers that there are not are NaN: see `analysis.scoring.raters.Agreement`.
    """

    measure: str
    between: str
    level: str
    value: float
    low: float
    high: float
    num_latents: int


# What is drawn together with a unit when an interval is made.
Cluster = Callable[[Unit], Hashable]


def alone(unit: Unit) -> Hashable:
    """Each unit is a cluster of its own."""
    return unit


@dataclass(frozen=True)
class Measure(Generic[Unit]):
    """Makes rows, with intervals by `bootstrap` over the clusters of units."""

    bootstrap: Bootstrap
    cluster_of: Cluster[Unit] = alone

    def alpha(self, between: str, level: str, raters: Sequence[Rater[Unit]]) -> AgreementRow:
        """Krippendorff's of any number of raters."""
        units = list(dict.fromkeys(unit for rater in raters for unit in rater))
        values = [[rater.get(unit) for rater in raters] for unit in units]
        return _row(ALPHA, between, level, krippendorff(values, self.bootstrap, self._clusters(units)))

    def kappa(self, between: str, level: str, first: Rater[Unit], second: Rater[Unit]) -> AgreementRow:
        """Cohen's of two."""
        pairs = [(answer, second.get(unit)) for unit, answer in first.items()]
        return _row(KAPPA, between, level, cohen(pairs, self.bootstrap, self._clusters(first)))

    def _clusters(self, units: Iterable[Unit]) -> list[Hashable]:
        return [self.cluster_of(unit) for unit in units]


def _row(measure: str, between: str, level: str, found: Agreement) -> AgreementRow:
    return AgreementRow(measure, between, level, found.value, *found.interval, found.num_units)


@dataclass(frozen=True)
class Vote:
    """What an annotator made of a latent in one repeat; `category` is None where it gave none."""

    latent: Key
    annotator: str
    repeat: int
    category: str | None


def read_votes(folder: Path) -> list[Vote]:
    """All votes of `categories.csv`. An annotator goes by who described: what placed the description is left out."""
    return [
        Vote((folder.name, row.latent), row.annotator.partition(", category by")[0], row.repeat, row.category or None)
        for row in read_categories(folder, votes=True)
    ]


def primary(votes: Iterable[Vote]) -> list[Vote]:
    """The votes that count in all tables: those of the first annotator in its first repeat."""
    votes = list(votes)
    return [vote for vote in votes if (vote.annotator, vote.repeat) == (votes[0].annotator, 0)]


def agreement_of(
    votes: Sequence[Vote],
    people: Mapping[str, Rater[Key]],
    group_of: Mapping[str, str],
    bootstrap: Bootstrap,
    cluster_of: Cluster[Key] = alone,
) -> list[AgreementRow]:
    """The rows for those raters that there are; none for one annotator, one repeat and no people.

    `group_of` is the class of a category, `cluster_of` what is resampled with a latent.
    """
    raters: dict[str, dict[int, dict[Key, str | None]]] = {}
    for vote in votes:
        raters.setdefault(vote.annotator, {}).setdefault(vote.repeat, {})[vote.latent] = vote.category
    measure = Measure(bootstrap, cluster_of)
    by_category = _rows("category", raters, people, measure)
    classes = {
        annotator: {repeat: _classes(said, group_of) for repeat, said in repeats.items()}
        for annotator, repeats in raters.items()
    }
    class_people = {who: _classes(said, group_of) for who, said in people.items()}
    return by_category + _rows("class", classes, class_people, measure)


def _classes(said: Rater[Key], group_of: Mapping[str, str]) -> Rater[Key]:
    return {latent: None if category is None else group_of[category] for latent, category in said.items()}


def _rows(
    level: str,
    raters: Mapping[str, Mapping[int, Rater[Key]]],
    people: Mapping[str, Rater[Key]],
    measure: Measure[Key],
) -> list[AgreementRow]:
    rows, names = [], list(raters)
    for annotator, repeats in raters.items():
        if len(repeats) > 1:
            between = "repeats" if annotator == names[0] else f"repeats of {annotator}"
            rows.append(measure.alpha(between, level, list(repeats.values())))
    firsts = {annotator: repeats[min(repeats)] for annotator, repeats in raters.items()}
    rows += [measure.kappa(f"{names[0]} and {other}", level, firsts[names[0]], firsts[other]) for other in names[1:]]
    return rows + rows_with_people(level, "annotator", firsts[names[0]] if names else {}, people, measure)


def rows_with_people(
    level: str, name: str, first: Rater[Unit], people: Mapping[str, Rater[Unit]], measure: Measure[Unit]
) -> list[AgreementRow]:
    """Every person against the rater `first`, which goes by `name`, and several people among themselves."""
    rows = []
    for who, said in people.items() if first else ():
        between = f"{name}{AND_PEOPLE}" + (f": {who}" if len(people) > 1 else "")
        rows.append(measure.kappa(between, level, first, said))
    if len(people) > 1:
        rows.append(measure.alpha("people", level, list(people.values())))
    return rows
