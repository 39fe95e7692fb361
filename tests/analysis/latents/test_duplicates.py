"""Groups of planted near-duplicates, and how much their documents overlap."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.examples.maxima import SCHEMA
from analysis.latents.duplicates import find_groups, groups_csv, similar


def turned(angle: float) -> list[float]:
    return [np.cos(angle), np.sin(angle), 0.0]


# A chain of 20 degrees each: neighbours have a cosine of .94, the ends of .77. Then one alone, and a pair.
CHAIN = [turned(np.radians(degrees)) for degrees in (0, 20, 40)]
ROWS = torch.tensor([*CHAIN, [0, 0, 1.0], [0, -1.0, 0], [0, -2.0, 0.1]], dtype=torch.float32)
LATENTS = [9, 2, 5, 7, 4, 11]


def grouped(limit: float = 0.9):
    """The rows belong to latents of one owner; latent 3, of another, has the row of latent 4."""
    owner_L = np.full(12, "shared")
    owner_L[LATENTS], owner_L[3] = "it", "pt"
    order = np.argsort(LATENTS)
    return find_groups(owner_L, {"it": ROWS[order], "pt": ROWS[4:5]}, limit)


def test_groups_are_connected_components_of_one_owner() -> None:
    group_L, groups = grouped()
    expected = np.arange(12)
    expected[[9, 5]], expected[11] = 2, 4
    assert group_L.tolist() == expected.tolist()
    assert [(group.owner, group.latents) for group in groups] == [("it", [2, 5, 9]), ("it", [4, 11])]
    assert groups[0].cosine_min == pytest.approx(np.cos(np.radians(20)), rel=1e-5) == groups[0].cosine_max


def test_a_higher_limit_joins_less() -> None:
    assert [group.latents for group in grouped(0.95)[1]] == [[4, 11]]


def test_chunks_find_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    expected = set(
        zip(*(place.tolist() for place in (torch.triu(cosine, 1) > 0.9).nonzero(as_tuple=True)), strict=True)
    )
    assert len(expected) > 10
    for values in (1, 50 * 7, 10**6):
        monkeypatch.setattr("analysis.latents.duplicates.CHUNK_VALUES", values)
        first, second, cosines = similar(rows, 0.9)
        assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
        np.testing.assert_allclose(cosines, cosine[first, second], rtol=1e-5)


def test_zero_rows_are_like_nothing() -> None:
    assert len(similar(torch.zeros(4, 3), 0.9)[0]) == 0
    assert len(similar(torch.zeros(0, 3), 0.9)[0]) == 0


def test_shared_documents_tell_duplicates_from_splits(tmp_path: Path) -> None:
    """Latent 2 fires on 1, latent 5 on 1, 2, 3, latent 9 on 3, 4: of four documents 1 and 3 are shared."""
    fired = [(2, 1), (5, 1), (5, 2), (5, 3), (9, 3), (9, 4), (7, 1), (7, 9)]
    rows = [{"latent": latent, "document": document, "max_activation": 1.0} for latent, document in fired]
    _, groups = grouped()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "maxima.parquet")
    table = list(csv.DictReader(io.StringIO(groups_csv(groups, tmp_path / "maxima.parquet"))))
    assert [(row["group"], row["size"], row["latents"]) for row in table] == [("2", "3", "2 5 9"), ("4", "2", "4 11")]
    assert (table[0]["num_documents"], table[0]["shared_documents"]) == ("4", "2")
    assert (table[1]["num_documents"], table[1]["shared_documents"]) == ("", "")  # of a set of models: not gathered
