"""What a judge is shown: held-out documents of every strength, near misses, and marks that are right or moved."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.examples.database import SCHEMA, Sample
from analysis.llm.documents import marked
from analysis.scoring.trials import Material, dealt, detection, fuzzing, held_out, moved_marks, spread

NUM_QUANTILES = 5


def sample(document: int, fired: dict[int, float], kind: str = "activating", quantile: int | None = None) -> Sample:
    """Thirty words of their own per document."""
    tokens = tuple(f" d{document}w{i}" for i in range(30))
    return Sample(document, tokens, fired, kind, quantile, max(fired.values(), default=0.0))


def material(per_quantile: int = 6, others: int = 20, num_quantiles: int = NUM_QUANTILES) -> Material:
    activating = [
        sample(100 * quantile + i, {10: 1.0 + quantile, 11: 0.5, 20: 0.7}, quantile=quantile)
        for quantile in range(num_quantiles)
        for i in range(per_quantile)
    ]
    near = [replace(sample(1000 + i, {}, "near_miss"), position=27) for i in range(others)]
    return Material(activating, near, [sample(2000 + i, {}, "silent") for i in range(others)])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_positives_come_from_all_strata_and_half_of_the_negatives_are_near_misses() -> None:
    trials = detection(material(), 10, 10, rng())
    drawn = Counter(trial.given.drawn for trial in trials)
    assert drawn == {"activating": 10, "near_miss": 5, "silent": 5}
    assert Counter(trial.given.quantile for trial in trials if trial.given.truth) == dict.fromkeys(range(5), 2)
    assert all(trial.given.truth == (trial.given.drawn == "activating") for trial in trials)
    assert len({trial.given.document for trial in trials}) == 20
    truths = [trial.given.truth for trial in trials]
    assert truths != sorted(truths) and truths != sorted(truths, reverse=True)  # in no order that gives them away


def test_the_same_seed_draws_the_same_documents() -> None:
    documents = [[t.given.document for t in detection(material(), 10, 10, np.random.default_rng(i))] for i in (3, 3, 4)]
    assert documents[0] == documents[1] != documents[2]


def test_missing_kinds_are_made_up_for_by_the_other() -> None:
    full = material()
    no_near = detection(Material(full.activating, [], full.silent), 4, 10, rng())
    assert Counter(trial.given.drawn for trial in no_near) == {"activating": 4, "silent": 10}
    few_silent = detection(Material(full.activating, full.near_misses, full.silent[:2]), 4, 10, rng())
    assert Counter(trial.given.drawn for trial in few_silent) == {"activating": 4, "near_miss": 8, "silent": 2}


def test_silent_documents_are_shown_around_tokens_at_random_and_near_misses_where_they_are_nearest() -> None:
    trials = [trial for trial in detection(material(), 10, 20, rng()) if not trial.given.truth]
    assert all(max(trial.example.activations.values()) == 0 for trial in trials)
    peaks = {kind: [t.example.peak for t in trials if t.given.drawn == kind] for kind in ("silent", "near_miss")}
    assert len(set(peaks["silent"])) > 5 and peaks["near_miss"] == [27] * 10


@pytest.mark.parametrize(("num_quantiles", "seed"), [(n, seed) for n in (2, 4, 5, 10) for seed in range(5)])
def test_fuzzing_takes_every_document_once_and_both_truths_from_all_strata(num_quantiles: int, seed: int) -> None:
    found = material(per_quantile=max(6, 30 // num_quantiles), num_quantiles=num_quantiles)
    trials = fuzzing(found, 10, 10, np.random.default_rng(seed), 30)
    assert Counter(trial.given.truth for trial in trials) == {True: 10, False: 10}
    assert len({trial.given.document for trial in trials}) == 20
    strata = [{trial.given.quantile for trial in trials if trial.given.truth == truth} for truth in (True, False)]
    assert strata[0] == strata[1] == set(range(num_quantiles))
    for trial in trials:
        is_true = set(trial.example.activations) == {10, 11, 20}
        assert is_true == trial.given.truth == (trial.given.drawn == "activating")


def test_truths_are_dealt_evenly_within_strata_and_up_to_their_numbers() -> None:
    strata = [sample(i, {0: 1.0}, quantile=quantile) for i, quantile in enumerate([0, 1, 2, 0, 1, 2, 0])]
    assert dealt(strata, 4, 4) == [True, False, True, False, True, False, True]
    assert Counter(dealt(strata, 1, 6)) == {True: 1, False: 6}


def test_few_documents_are_shared_between_the_truths() -> None:
    few = Material(material(per_quantile=1).activating, [], [])
    assert Counter(trial.given.truth for trial in fuzzing(few, 10, 10, rng(), 30)) == {True: 3, False: 2}


@pytest.mark.parametrize("seed", range(20))
def test_moved_marks_have_the_lengths_of_the_true_ones_and_avoid_them(seed: int) -> None:
    true = sample(1, {10: 1.0, 11: 0.5, 20: 0.7})
    moved = moved_marks(true, 30, np.random.default_rng(seed))
    assert moved is not None
    assert not set(moved.activations) & {10, 11, 20} and len(moved.activations) == 3
    positions = sorted(moved.activations)
    gaps = np.diff(positions).tolist()
    assert 1 in gaps and max(gaps) > 1  # one run of two, one of one


def test_marks_stay_within_what_is_shown_and_on_blanks_only_where_the_true_ones_are() -> None:
    tokens = ("a", " ", "\n", "b", " ", "c", "d")
    blank = Sample(1, tokens, {3: 1.0}, "activating", 0, 1.0)
    found = {
        min(moved.activations) for seed in range(30) if (moved := moved_marks(blank, 7, np.random.default_rng(seed)))
    }
    assert found == {0, 5, 6}
    newline = replace(blank, activations={2: 1.0})
    moved = {next(iter(found.activations)) for s in range(30) if (found := moved_marks(newline, 7, rng(s)))}
    assert moved == {1, 4}
    everywhere = Sample(1, ("a", "b"), {0: 1.0, 1: 2.0}, "activating", 0, 2.0)
    assert moved_marks(everywhere, 2, rng()) is None
    far = sample(1, {10: 1.0})
    moved = moved_marks(far, 6, rng())
    assert moved is not None and all(6 <= position < 12 for position in moved.activations)


def test_documents_without_room_for_moved_marks_are_in_neither_part() -> None:
    full = Sample(7, ("a", "b"), {0: 1.0, 1: 2.0}, "activating", 0, 2.0)
    trials = fuzzing(Material([full, *material().activating], [], []), 10, 10, rng(), 9)
    assert len(trials) == 20 and 7 not in {trial.given.document for trial in trials}
    assert fuzzing(Material([full], [], []), 10, 10, rng(), 9) == []


def test_what_is_marked_does_not_tell_which_marks_are_moved() -> None:
    """Marks on blanks, runs and their lengths are alike in both parts, also where documents exceed the window."""
    draw = np.random.default_rng(1)
    activating = []
    for i in range(40):
        tokens = tuple("\n" if draw.random() < 0.3 else f" w{j}" for j in range(200))
        first = int(draw.integers(190))
        fired = {first: 3.0, first + 1: 2.0, int(draw.integers(200)): 1.0, (first + 7) % 200: 0.5}
        activating.append(Sample(i, tokens, fired, "activating", i % 10, 3.0))
    pairs = [(true, moved) for true in activating if (moved := moved_marks(true, 32, draw))]
    assert len(pairs) > 30
    for true, moved in pairs:
        shown = [re.findall("«(.*?)»", marked(e, 32, ("«", "»")), re.DOTALL) for e in (true, moved)]
        looks = [sorted(re.sub(r" w\d+", "w", text) for text in texts) for texts in shown]
        assert looks[0] == looks[1]
        assert not set(moved.activations) & set(true.activations)


def test_spread_takes_from_every_stratum_before_it_takes_twice() -> None:
    chosen = spread(material().activating, 7, rng())
    counts = Counter(sample.quantile for sample in chosen)
    assert len(counts) == 5 and max(counts.values()) == 2
    assert len(spread(material().activating, 1000, rng())) == 30


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Latent 1: documents 0 to 3 are its top; 0, 2, 4 and 5 were drawn, and 5 has the text of 1."""
    with sqlite3.connect(tmp_path / "examples.sqlite") as connection:
        connection.executescript(SCHEMA)
        for document in range(6):
            tokens = json.dumps([f"text {1 if document == 5 else document}"])
            row = (document, f"d{document}", "s", "{}", tokens, "[]")
            connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", row)
        for rank in range(4):
            connection.execute("INSERT INTO examples VALUES (1, ?, ?, ?, '[[0, 1.0]]')", (rank, rank, 9.0 - rank))
        for document in (0, 2, 4, 5):
            connection.execute("INSERT INTO samples VALUES (1, 'activating', 0, ?, 1.0, '[[0, 1.0]]', 0)", (document,))
    yield connection
    connection.close()


def test_documents_that_the_annotator_saw_are_never_drawn(database: sqlite3.Connection) -> None:
    left = {shown: [s.document for s in held_out(database, 1, shown).activating] for shown in (1, 2, 3, 4)}
    assert left == {1: [2, 4, 5], 2: [2, 4], 3: [4], 4: [4]}
