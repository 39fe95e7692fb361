"""Trials for descriptions: documents that the annotator was not shown, in some of which the description must fail.

    detection   documents in which the latent fires, from all strata of its strength, among documents in which it is
                silent, half of them near misses, shown where they come nearest: does it fire here?
    fuzzing     documents in which it fires, with marks at the tokens where it does, or as many elsewhere: are the marks
                right?

(arXiv 2410.13928.) What is drawn depends on the seed and the latent alone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from analysis.examples.database import Example, Sample, read_examples, read_samples
from analysis.examples.samples import ACTIVATING, NEAR_MISS, SILENT
from analysis.llm.documents import window

WRONG_MARKS = "wrong_marks"
DETECTION, FUZZING = "detection", "fuzzing"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Given:
    """How a document came into a question (`drawn` and `quantile`); `truth` is what a right description leads to."""

    document: int
    drawn: str
    quantile: int | None
    truth: bool


@dataclass(frozen=True)
class Trial:
    """One document of a question; `example` fires where marks will be."""

    example: Example
    given: Given


@dataclass(frozen=True)
class Material:
    """The documents of a latent that the annotator did not see."""

    activating: list[Sample]
    near_misses: list[Sample]
    silent: list[Sample]


def held_out(database: sqlite3.Connection, latent: int, num_shown: int) -> Material:
    """The samples of a latent without those that have the text of one of its `num_shown` top documents."""
    shown = {example.tokens for example in read_examples(database, latent, num_shown)}
    left = [sample for sample in read_samples(database, latent) if sample.tokens not in shown]
    kinds = [[sample for sample in left if sample.kind == kind] for kind in (ACTIVATING, NEAR_MISS, SILENT)]
    return Material(*kinds)


def detection(material: Material, num_positive: int, num_negative: int, rng: np.random.Generator) -> list[Trial]:
    """At most so many documents of either truth, in random order; near misses are half of the negatives if they can."""
    positive = [Trial(s, _given(s, s.kind, True)) for s in spread(material.activating, num_positive, rng)]
    near = _draw(material.near_misses, max(num_negative // 2, num_negative - len(material.silent)), rng)
    silent = _draw(material.silent, num_negative - len(near), rng)
    negative = [Trial(_nearest(s, rng), _given(s, s.kind, False)) for s in near + silent]
    return _permuted(positive + negative, rng)


def fuzzing(
    material: Material, num_positive: int, num_negative: int, rng: np.random.Generator, context: int
) -> list[Trial]:
    """Documents in which the latent fires, each once: the marks of one part are right, those of the other are moved.

    Documents without room to move their marks stand in neither part: what they have in common would tell the parts
    apart. The parts share the strata: see `dealt`.
    """
    usable: list[Sample] = []
    moved: dict[int, Example] = {}
    for sample in spread(material.activating, len(material.activating), rng):
        if len(usable) < num_positive + num_negative and (other := moved_marks(sample, context, rng)):
            usable.append(sample)
            moved[sample.document] = other
    trials = [
        Trial(sample, _given(sample, ACTIVATING, True))
        if truth
        else Trial(moved[sample.document], _given(sample, WRONG_MARKS, False))
        for sample, truth in zip(usable, dealt(usable, num_positive, num_negative), strict=True)
    ]
    return _permuted(trials, rng)


def dealt(samples: Sequence[Sample], num_true: int, num_false: int) -> list[bool]:
    """A truth for each sample, at most so many of either, in even parts within every stratum and over all.

    In turn, each gets the truth that its stratum has fewer of; where they are even, that which all have fewer of.
    """
    left = {True: num_true, False: num_false}
    given: dict[int | None, list[bool]] = {}
    truths: list[bool] = []
    for sample in samples:
        mine = given.setdefault(sample.quantile, [])
        truth = min((True, False), key=lambda truth: (left[truth] < 1, mine.count(truth), truths.count(truth)))
        left[truth] -= 1
        mine.append(truth)
        truths.append(truth)
    return truths


def _given(sample: Sample, drawn: str, truth: bool) -> Given:
    return Given(sample.document, drawn, sample.quantile, truth)


def spread(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> list[Sample]:
    """`number` of the samples at random, as evenly over their quantiles as can be."""
    by_quantile: dict[int | None, list[Sample]] = {}
    for sample in _permuted(samples, rng):
        by_quantile.setdefault(sample.quantile, []).append(sample)
    rounds = [
        (turn, quantile or 0, sample) for quantile, found in by_quantile.items() for turn, sample in enumerate(found)
    ]
    # Within a round the strata come in random order, so that no stratum is always the one that is cut.
    order = {quantile or 0: place for place, quantile in enumerate(_permuted(list(by_quantile), rng))}
    return [sample for _, _, sample in sorted(rounds, key=lambda entry: (entry[0], order[entry[1]]))][:number]


def moved_marks(sample: Sample, context: int, rng: np.random.Generator) -> Example | None:
    """The document with the runs of marks that its window shows put on tokens that do not fire, in one window too.

    Runs keep their lengths, and blanks in them their places: which marks are moved must not show by what is marked. The
    run of the strongest token goes near it, since what is shown are its surroundings; the others go into these. None
    where there is no room, or nothing to see in the marks.
    """
    tokens, (start, end) = sample.tokens, window(sample, context)
    runs = _runs([i for i in sample.activations if start <= i < end])
    if not any(tokens[i] for run in runs for i in run):
        return None
    # The run of the strongest token first, then the longest.
    runs.sort(key=lambda run: (sample.peak not in run, -len(run)))
    taken, peak, marks = set(sample.activations), sample.peak, dict[int, float]()
    for run in runs:
        places = [i for i in range(start, end - len(run) + 1) if _fits(tokens, run, i, taken)]
        if not places:
            return None
        place = int(rng.choice(places))
        if not marks:
            peak = place + sample.peak - run[0]
            start, end = window(Example(sample.document, tokens, {peak: 1.0}), context)
        # A token on either side stays free: two runs that touch would be one.
        taken |= set(range(place - 1, place + len(run) + 1))
        marks |= dict.fromkeys(range(place, place + len(run)), 1.0)
    return Example(sample.document, tokens, marks | {peak: 2.0})


def _fits(tokens: Sequence[str], run: Sequence[int], place: int, taken: set[int]) -> bool:
    """Whether the marks of a run can go to `place`: free tokens, blank and without text where those of the run are."""
    return all(
        i not in taken and _look(tokens[i]) == _look(tokens[marked]) for i, marked in enumerate(run, start=place)
    )


def _look(token: str) -> tuple[bool, bool]:
    return bool(token), bool(token.strip())


def _runs(positions: list[int]) -> list[list[int]]:
    """The runs of neighbouring positions: [4, 5, 9] -> [[4, 5], [9]]."""
    breaks = np.flatnonzero(np.diff(sorted(positions)) != 1) + 1
    return [run.tolist() for run in np.split(np.array(sorted(positions)), breaks)]


def _nearest(sample: Sample, rng: np.random.Generator) -> Sample:
    """A document in which nothing fires, to be shown around the token that comes nearest to it, or one at random."""
    place = int(rng.integers(len(sample.tokens))) if sample.position is None else sample.position
    return replace(sample, activations={place: 0.0})


def _draw(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> list[Sample]:
    return _permuted(samples, rng)[: max(number, 0)]


def _permuted(values: Sequence[Value], rng: np.random.Generator) -> list[Value]:
    return [values[i] for i in rng.permutation(len(values))]
