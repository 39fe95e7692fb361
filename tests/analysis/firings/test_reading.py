"""Batches of whole documents, groups that are resampled, first documents of each text."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from analysis.firings.reading import Reading
from analysis.firings.token_kinds import TokenKinds, read_kinds
from tests.analysis.random_study import NUM_DOCUMENTS, document, make_study
from train.data import ActivationPairs
from train.kept import KeptTokens

NO_KINDS = TokenKinds([], np.zeros(0, np.uint8), [], np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ActivationPairs:
    return ActivationPairs.open(make_study(tmp_path_factory.mktemp("study")))


def reading_of(pairs: ActivationPairs, batch_tokens: int, num_groups: int = 10) -> Reading:
    return Reading(pairs, read_kinds(pairs.tokens, []), batch_tokens, num_groups)


def made_up(lengths: list[int], is_kept_T: np.ndarray) -> Any:
    """Documents of these lengths, without activations."""
    tokens = SimpleNamespace(row_starts=np.concatenate([[0], np.cumsum(lengths)]))
    return SimpleNamespace(tokens=tokens, kept=KeptTokens(is_kept_T, []))


def test_kept_tokens_of_documents_that_have_none() -> None:
    is_kept_T = np.array([True, False, True, False, True, True])
    reading = Reading(made_up([0, 3, 0, 1, 2, 0], is_kept_T), NO_KINDS, batch_tokens=2, num_groups=2)
    assert reading.kept_n.tolist() == [0, 2, 0, 0, 2, 0] and reading.num_tokens == 4


def test_counting_takes_no_memory_for_each_token() -> None:
    pairs = made_up([1000] * 2000, np.ones(2_000_000, dtype=bool))
    tracemalloc.start()
    reading = Reading(pairs, NO_KINDS, batch_tokens=2048, num_groups=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reading.num_tokens == 2_000_000 and peak < 500_000


@pytest.mark.parametrize("batch_tokens", [1, 7, 30, 10**6])
def test_batches_hold_every_kept_token_once(pairs: ActivationPairs, batch_tokens: int) -> None:
    reading = reading_of(pairs, batch_tokens)
    batches = list(reading.batches(0))
    assert len(batches) == reading.num_batches
    found = [token for b in batches for token in zip(b.document_B.tolist(), b.position_B.tolist(), strict=True)]
    expected = []
    for number in range(NUM_DOCUMENTS):
        x_NMD, kept_N = pairs.document(number)
        positions = kept_N.nonzero().squeeze(1).tolist()
        expected += [(number, position) for position in positions]
        batch = next(b for b in batches if b.first <= number < b.last)
        assert batch.x_BMD[batch.document_B == number].tolist() == x_NMD[kept_N].tolist()
    assert found == expected and len(found) == reading.num_tokens
    sizes = [len(batch.document_B) for batch in batches]
    assert all(size < batch_tokens + 11 for size in sizes)  # the longest document has 11 tokens
    assert [reading.tokens_before(i) for i in range(len(batches) + 1)] == [0, *np.cumsum(sizes)]


def test_reading_from_a_batch_on(pairs: ActivationPairs) -> None:
    reading = reading_of(pairs, 30)
    whole, rest = list(reading.batches(0)), list(reading.batches(4))
    assert [batch.first for batch in rest] == [batch.first for batch in whole[4:]]


def test_documents_belong_to_one_group_and_groups_are_alike_in_size(pairs: ActivationPairs) -> None:
    """Whatever the batches."""
    reading = reading_of(pairs, 30)
    assert np.array_equal(reading.group_n, reading_of(pairs, 7).group_n)
    sizes = np.bincount(reading.group_n, weights=reading.kept_n, minlength=10)
    assert sizes.min() > 0 and sizes.max() < 2 * sizes.mean()
    for batch in reading.batches(0):
        assert batch.group_B.tolist() == reading.group_n[batch.document_B].tolist()


def test_large_stores_are_dealt_out_in_blocks(pairs: ActivationPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.firings.reading.BLOCK_TOKENS", 20)
    group_n = reading_of(pairs, 30, num_groups=3).group_n
    changes = np.flatnonzero(np.diff(group_n))
    assert len(changes) > 6 and set((np.diff(group_n)[changes] % 3).tolist()) == {1}  # 0, 1, 2, 0, 1, ...


def test_the_first_document_of_each_text(pairs: ActivationPairs) -> None:
    contents = [document(i).content_sha256 for i in range(NUM_DOCUMENTS)]
    expected = [content not in contents[:i] for i, content in enumerate(contents)]
    assert reading_of(pairs, 30).is_first_n.tolist() == expected and not all(expected)
