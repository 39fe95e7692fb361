"""Trials for descriptions: documents that the annotator was not shown, in some of which the description must fail.

    detection   documents in which the latent fires, from all strata of its strength, among documents in which it is
                silent, half of them near misses: does it fire here?
    fuzzing     documents in which it fires, with marks at the tokens where it does, or as many elsewhere: are the marks
                right?

(arXiv 2410.13928.) What is drawn depends on the seed and the latent alone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.examples import Example, Sample, read_examples, read_samples
from analysis.llm.documents import window

ACTIVATING, NEAR_MISS, SILENT, WRONG_MARKS = "activating", "near_miss", "silent", "wrong_marks"
DETECTION, FUZZING = "detection", "fuzzing"


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
    """The samples of a latent without its `num_shown` top documents and without their texts."""
    shown = read_examples(database, latent, num_shown)
    numbers, texts = {example.document for example in shown}, {example.tokens for example in shown}
    left = [s for s in read_samples(database, latent) if s.document not in numbers and s.tokens not in texts]
    kinds = [[sample for sample in left if sample.kind == kind] for kind in (ACTIVATING, NEAR_MISS, SILENT)]
    return Material(*kinds)


def detection(material: Material, num_positive: int, num_negative: int, rng: np.random.Generator) -> list[Trial]:
    """At most so many documents of either truth, in random order; near misses are half of the negatives if they can."""
    positive = [Trial(s, _given(s, s.kind, True)) for s in spread(material.activating, num_positive, rng)]
    near = _draw(material.near_misses, max(num_negative // 2, num_negative - len(material.silent)), rng)
    silent = _draw(material.silent, num_negative - len(near), rng)
    negative = [Trial(_somewhere(s, rng), _given(s, s.kind, False)) for s in near + silent]
    return _shuffled(positive + negative, rng)


def fuzzing(
    material: Material, num_positive: int, num_negative: int, rng: np.random.Generator, context: int
) -> list[Trial]:
    """Documents in which the latent fires, each once: the marks of one part are right, those of the other are moved."""
    drawn = spread(material.activating, num_positive + num_negative, rng)
    num_moved = min(num_negative, len(drawn) // 2)
    trials = []
    for place, sample in enumerate(drawn):
        # Every other one, so that both parts have documents of all strata.
        moved = moved_marks(sample, context, rng) if place % 2 and place // 2 < num_moved else None
        if moved:
            trials.append(Trial(moved, _given(sample, WRONG_MARKS, False)))
        elif sum(trial.given.truth for trial in trials) < num_positive:
            trials.append(Trial(sample, _given(sample, ACTIVATING, True)))
    return _shuffled(trials, rng)


def _given(sample: Sample, drawn: str, truth: bool) -> Given:
    return Given(sample.document, drawn, sample.quantile, truth)


def spread(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> list[Sample]:
    """`number` of the samples at random, as evenly over their quantiles as can be."""
    by_quantile: dict[int | None, list[Sample]] = {}
    for sample in _draw(samples, len(samples), rng):
        by_quantile.setdefault(sample.quantile, []).append(sample)
    rounds = [
        (turn, quantile or 0, sample) for quantile, found in by_quantile.items() for turn, sample in enumerate(found)
    ]
    # Within a round the strata come in random order, so that no stratum is always the one that is cut.
    order = {quantile or 0: place for place, quantile in enumerate(_permuted(list(by_quantile), rng))}
    return [sample for _, _, sample in sorted(rounds, key=lambda entry: (entry[0], order[entry[1]]))][:number]


def moved_marks(sample: Sample, context: int, rng: np.random.Generator) -> Example | None:
    """The document with runs of marks as long as those of its firing tokens, on tokens near them that do not fire.

    None where there is no room for them.
    """
    start, end = window(sample, context)
    free = [i not in sample.activations and bool(sample.tokens[i].strip()) for i in range(start, end)]
    marks: dict[int, float] = {}
    for length in sorted(_runs([i for i in sample.activations if start <= i < end]), reverse=True):
        places = [i for i in range(len(free) - length + 1) if all(free[i : i + length])]
        if not places:
            return None
        place = int(rng.choice(places))
        # A token on either side stays free: two runs that touch would be one.
        for i in range(max(place - 1, 0), min(place + length + 1, len(free))):
            free[i] = False
        marks |= dict.fromkeys(range(start + place, start + place + length), 1.0)
    # The window that is shown is that around the mark nearest to the true one, so it holds about the same text.
    marks[min(marks, key=lambda position: abs(position - sample.peak))] = 2.0
    return Example(sample.document, sample.tokens, marks)


def _runs(positions: list[int]) -> list[int]:
    """Lengths of the runs of neighbouring positions: [4, 5, 9] -> [2, 1]."""
    breaks = np.flatnonzero(np.diff(sorted(positions)) != 1) + 1
    return [len(run) for run in np.split(np.array(positions), breaks)]


def _somewhere(sample: Sample, rng: np.random.Generator) -> Sample:
    """A document in which nothing fires, to be shown around a token at random."""
    return replace(sample, activations={int(rng.integers(len(sample.tokens))): 0.0})


def _draw(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> list[Sample]:
    return [samples[i] for i in rng.permutation(len(samples))[: max(number, 0)]]


def _permuted(values: list, rng: np.random.Generator) -> list:
    return [values[i] for i in rng.permutation(len(values))]


def _shuffled(trials: list[Trial], rng: np.random.Generator) -> list[Trial]:
    return [trials[i] for i in rng.permutation(len(trials))]
