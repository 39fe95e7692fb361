"""Files of an analysis that were cut off: one sentence with the file, the line and the remedy."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.annotate.annotations import read_annotations
from analysis.annotate.step import annotate
from analysis.damage import readable
from analysis.examples.database import all_documents, reading
from analysis.examples.maxima import SCHEMA, read_documents_of, read_maxima
from analysis.latents.columns import models_of, read_columns
from analysis.taxonomy.categories import read_categories
from analysis.taxonomy.step import categorise
from extract.errors import BadInput
from tests.analysis.made_study import make_study

REMEDY = "the file was cut off or altered. Remove it and run `python -m analysis` again"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings, folders = make_study(tmp_path_factory.mktemp("study"))
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folders[0])
    categorise(settings, folders[0])
    return folders[0]


def cut(folder: Path, name: str, tmp_path: Path, size: int) -> Path:
    """A folder with that file alone, of which `size` bytes are left; a negative number is of those that are lost."""
    content = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(content[:size])
    return tmp_path


def read_documents(folder: Path) -> None:
    with reading(folder) as database:
        list(all_documents(database))


@pytest.mark.parametrize(
    ("name", "size", "place", "read"),
    [
        ("latents.parquet", -100, "latents.parquet", read_columns),
        ("latents.parquet", 2000, "latents.parquet", models_of),
        ("annotations.jsonl", -30, "annotations.jsonl, line 3,", read_annotations),
        ("annotations.jsonl", 40, "annotations.jsonl, line 1,", read_annotations),
        ("categories.csv", 150, "categories.csv, line 2,", read_categories),
        ("categories.csv", -2, "categories.csv, line 4,", read_categories),
        ("examples.sqlite", 9000, "examples.sqlite", read_documents),
        ("examples.sqlite", -5000, "examples.sqlite", read_documents),
    ],
)
def test_what_was_cut_off(
    folder: Path, tmp_path: Path, name: str, size: int, place: str, read: Callable[[Path], object]
) -> None:
    read(folder)
    with pytest.raises(BadInput, match=f"{tmp_path / place} cannot be read .*{REMEDY}"):
        read(cut(folder, name, tmp_path, size))


@pytest.mark.parametrize("read", [lambda path: list(read_maxima(path)), lambda path: read_documents_of(path, [1])])
def test_document_maxima_that_were_cut_off(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "document_maxima.parquet"
    pq.write_table(pa.table({"latent": [1], "document": [2], "max_activation": [0.5]}, SCHEMA), path)
    read(path)
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(BadInput, match=f"{path} cannot be read .*{REMEDY}"):
        read(path)


def test_an_altered_line(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    (tmp_path / "annotations.jsonl").write_text("\n".join([lines[0], '{"latent": 3}', *lines[2:]]))
    with pytest.raises(BadInput, match=r"annotations\.jsonl, line 2, cannot be read \('evidence'\)"):
        read_annotations(tmp_path)


def test_other_errors_are_not_of_the_file(folder: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"), reading(folder) as database:
        database.execute("SELECT * FROM strangers")
    with pytest.raises(FileNotFoundError):
        read_annotations(folder / "nowhere")


def test_what_the_system_refuses_is_not_called_damage(tmp_path: Path) -> None:
    """The remedy removes the file, which may be whole and paid for."""
    with pytest.raises(PermissionError), readable(tmp_path / "annotations.jsonl"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(BadInput, match=re.escape(REMEDY)), readable(tmp_path / "latents.parquet"):
        raise OSError("a page is torn")  # as pyarrow says it
