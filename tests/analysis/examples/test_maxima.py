"""Rows of document maxima: those of wanted latents, cut back, and as Parquet."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.examples.maxima import SCHEMA, MaximaSpool, read_documents_of, read_maxima
from analysis.firings.firings import DocumentFirings
from extract.errors import BadInput


def fired(document: int, latent: int, value: float) -> DocumentFirings:
    return DocumentFirings.group(*map(np.array, ([document], [1], [latent], [value])))


def test_the_wanted_latents_are_kept(tmp_path: Path) -> None:
    columns = ([0, 0, 1], [1, 1, 2], [0, 2, 2], [1.0, 2.0, 3.0])
    firings = DocumentFirings.group(*map(np.array, columns))
    spool = MaximaSpool(tmp_path / "rows", np.array([False, True, True]))
    spool.add(firings)
    spool.add(firings.select(np.array([], dtype=int)))
    spool.publish(tmp_path / "maxima.parquet")
    spool.close()
    assert pq.read_table(tmp_path / "maxima.parquet").to_pylist() == [
        {"latent": 2, "document": 0, "max_activation": 2.0},
        {"latent": 2, "document": 1, "max_activation": 3.0},
    ]


def test_many_batches_share_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.examples.maxima.ROWS_PER_GROUP", 4)
    spool = MaximaSpool(tmp_path / "rows", np.array([True]))
    for document in range(10):
        spool.add(fired(document, 0, float(document)))
    spool.publish(tmp_path / "maxima.parquet")
    spool.close()
    written = pq.ParquetFile(tmp_path / "maxima.parquet")
    assert [written.metadata.row_group(i).num_rows for i in range(written.num_row_groups)] == [4, 4, 2]
    assert written.read()["document"].to_pylist() == list(range(10))


def test_the_file_is_sorted_by_latent_and_then_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows cut batches and latents; readers get one latent at a time, or the groups that they ask."""
    monkeypatch.setattr("analysis.examples.maxima.ROWS_PER_GROUP", 3)
    monkeypatch.setattr("analysis.examples.maxima.ROWS_PER_BATCH", 2)
    spool, rng, expected = MaximaSpool(tmp_path / "rows", np.ones(5, dtype=bool)), np.random.default_rng(0), []
    for document in range(12):
        for latent in np.flatnonzero(rng.random(5) < [0.9, 0.5, 0, 0.5, 0.2]).tolist():
            expected.append((latent, document, document + latent / 8))
            spool.add(fired(document, latent, document + latent / 8))
    path = tmp_path / "maxima.parquet"
    spool.publish(path)
    spool.close()
    expected.sort()
    assert [tuple(row.values()) for row in pq.read_table(path).to_pylist()] == expected
    found = [(j, *row) for j, documents, maxima in read_maxima(path) for row in zip(documents, maxima, strict=True)]
    assert found == expected and [j for j, *_ in read_maxima(path)] == [0, 1, 3, 4]
    assert read_documents_of(path, [1, 4]).tolist() == [i for j, i, _ in expected if j in (1, 4)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["maxima.parquet", "rows"]


def test_a_file_that_is_not_sorted_is_refused(tmp_path: Path) -> None:
    columns = [pa.array([1, 0, 1], pa.int32()), pa.array([0, 0, 1], pa.int32()), pa.array([1.0, 1, 1], pa.float32())]
    pq.write_table(pa.table(columns, SCHEMA), tmp_path / "maxima.parquet")
    with pytest.raises(BadInput, match="of an earlier version"):
        list(read_maxima(tmp_path / "maxima.parquet"))


def test_nothing_fires(tmp_path: Path) -> None:
    spool = MaximaSpool(tmp_path / "rows", np.array([True]))
    spool.publish(tmp_path / "maxima.parquet")
    spool.close()
    assert pq.read_table(tmp_path / "maxima.parquet").num_rows == 0
    assert list(read_maxima(tmp_path / "maxima.parquet")) == []


def test_rows_after_a_saved_place_are_cut_off(tmp_path: Path) -> None:
    """As after a kill: rows were written that the state does not know of, the last of them torn."""
    spool = MaximaSpool(tmp_path / "rows", np.array([True]))
    spool.add(fired(0, 0, 1.0))
    saved = spool.num_rows
    spool.add(fired(1, 0, 2.0))
    spool.close()
    with (tmp_path / "rows").open("ab") as file:
        file.write(b"torn")
    again = MaximaSpool(tmp_path / "rows", np.array([True]), saved)
    again.add(fired(2, 0, 3.0))
    again.publish(tmp_path / "maxima.parquet")
    again.close()
    assert pq.read_table(tmp_path / "maxima.parquet")["document"].to_pylist() == [0, 2]
