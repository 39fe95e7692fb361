"""`document_maxima.parquet`: the maximum of every latent that a model may own in every document in which it fires.

They are gathered while the store is read for everything else: another pass would read terabytes again. The maxima of
all latents would fill tens of gigabytes, but the decoder norms alone rule out nearly all of them beforehand.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.firings import DocumentFirings
from extract.publish import publishing

SCHEMA = pa.schema([("latent", pa.int32()), ("document", pa.int32()), ("max_activation", pa.float32())])
ROW = np.dtype([("latent", "<i4"), ("document", "<i4"), ("max_activation", "<f4")])
# Rows that are written together: Parquet files of many small row groups are slow to read.
ROWS_PER_GROUP = 2**20


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
        """All rows as Parquet; how the stream was interrupted does not show in its bytes."""
        self._file.flush()
        with publishing(path) as file, pq.ParquetWriter(file, SCHEMA) as writer, self._path.open("rb") as spool:
            while data := spool.read(ROWS_PER_GROUP * ROW.itemsize):
                rows = np.frombuffer(data, dtype=ROW)
                writer.write_table(pa.table({name: np.ascontiguousarray(rows[name]) for name in SCHEMA.names}, SCHEMA))
