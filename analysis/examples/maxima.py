"""`document_maxima.parquet`: the maximum of every latent that a model, or several but not all, may own, in every
document in which it fires.

They are gathered while the store is read for everything else: another pass would read terabytes again. The maxima of
all latents would fill tens of gigabytes, but the decoder norms alone rule out nearly all of them beforehand.

The stream is sorted by document, the file by latent and document: readers take one latent at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.damage import readable
from analysis.firings.firings import DocumentFirings
from extract.errors import BadInput
from extract.publish import partial_of, publishing

SCHEMA = pa.schema([("latent", pa.int32()), ("document", pa.int32()), ("max_activation", pa.float32())])
ROW = np.dtype([("latent", "<i4"), ("document", "<i4"), ("max_activation", "<f4")])
# Rows that are written together: Parquet files of many small row groups are slow to read.
ROWS_PER_GROUP = 2**20
# Rows that a reader holds beside those of one latent.
ROWS_PER_BATCH = 2**16


class MaximaSpool:
    """Rows of the latents in `wanted_L`, appended to a plain file that can be cut back to any number of rows."""

    def __init__(self, path: Path, wanted_L: np.ndarray, num_rows: int = 0) -> None:
        """Goes on after the first `num_rows` rows of the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._wanted_L, self._path = wanted_L, path
        self._file = open(path, "r+b" if num_rows else "wb")  # noqa: SIM115 - closed by close
        self._file.truncate(num_rows * ROW.itemsize)
        self._file.seek(0, os.SEEK_END)
        self.num_rows = num_rows

    def add(self, firings: DocumentFirings) -> None:
        wanted_g = np.flatnonzero(self._wanted_L[firings.latent_g])
        rows = np.empty(len(wanted_g), dtype=ROW)
        for name, column_g in zip(SCHEMA.names, (firings.latent_g, firings.document_g, firings.maximum_g), strict=True):
            rows[name] = column_g[wanted_g]
        self._file.write(rows.tobytes())
        self.num_rows += len(rows)

    def sync(self) -> None:
        """All rows so far are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def publish(self, path: Path) -> None:
        """All rows as Parquet, sorted; how the stream was interrupted does not show in its bytes."""
        self._file.flush()
        partial = partial_of(self._path)
        try:
            self._sort(partial)
            with publishing(path) as file, pq.ParquetWriter(file, SCHEMA) as writer:
                for rows in _chunks(partial):
                    columns = {name: np.ascontiguousarray(rows[name]) for name in SCHEMA.names}
                    writer.write_table(pa.table(columns, SCHEMA))
        finally:
            partial.unlink(missing_ok=True)

    def _sort(self, path: Path) -> None:
        """Copies the rows to `path`, by latent and within one in their order, with a chunk of them in memory."""
        counts_L = np.zeros(len(self._wanted_L), dtype=np.int64)
        for rows in _chunks(self._path):
            counts_L += np.bincount(rows["latent"], minlength=len(counts_L))
        with path.open("wb") as file:
            file.truncate(self.num_rows * ROW.itemsize)
        if not self.num_rows:
            return  # nothing cannot be mapped
        sorted_rows, next_L = np.memmap(path, ROW, "r+"), counts_L.cumsum() - counts_L
        for rows in _chunks(self._path):
            order = rows["latent"].argsort(kind="stable")
            latent_r = rows["latent"][order]
            first_L = np.bincount(latent_r, minlength=len(counts_L)).cumsum()
            added_L = np.diff(first_L, prepend=0)
            first_L -= added_L
            sorted_rows[next_L[latent_r] + np.arange(len(latent_r)) - first_L[latent_r]] = rows[order]
            next_L += added_L


def read_maxima(path: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Every latent of `document_maxima.parquet` in ascending order, with its documents and maxima there; one latent in
    memory at a time. BadInput for a file that is not sorted.
    """
    latent, documents, maxima = -1, list[np.ndarray](), list[np.ndarray]()
    with readable(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_BATCH):
            latent_r, document_r, maximum_r = (batch[name].to_numpy() for name in SCHEMA.names)
            starts = np.flatnonzero(np.diff(latent_r, prepend=-1))
            for first, last in pairwise([*starts.tolist(), len(latent_r)]):
                if latent_r[first] != latent:
                    if latent_r[first] < latent:
                        raise BadInput(
                            f"{path} is of an earlier version. Remove it and run `python -m analysis` again."
                        )
                    if latent >= 0:
                        yield latent, np.concatenate(documents), np.concatenate(maxima)
                    latent, documents, maxima = int(latent_r[first]), [], []
                documents.append(document_r[first:last])
                maxima.append(maximum_r[first:last])
    if latent >= 0:
        yield latent, np.concatenate(documents), np.concatenate(maxima)


def read_documents_of(path: Path, latents: Iterable[int]) -> np.ndarray:
    """The documents in which each of some latents fires, one latent after another; only their row groups are read."""
    with readable(path):
        table = pq.read_table(path, columns=["document"], filters=[("latent", "in", list(latents))])
    return table["document"].to_numpy()


def _chunks(path: Path) -> Iterator[np.ndarray]:
    """The rows of a plain file, many at a time."""
    with path.open("rb") as file:
        while data := file.read(ROWS_PER_GROUP * ROW.itemsize):
            yield np.frombuffer(data, dtype=ROW)
