"""What a command no longer writes goes; what others put beside it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.written_files import is_incomplete, rewriting, written
from extract.errors import BadInput
from extract.publish import publish


def write(root: Path, *names: str) -> None:
    """One run that writes these tables, all with the same content."""
    with rewriting(root / "files.json", [root / "tables"]):
        for name in names:
            publish(root / "tables" / name, b"text")


def names_in(root: Path) -> set[str]:
    return {path.name for path in (root / "tables").iterdir()}


def test_what_a_run_no_longer_writes_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "notes.csv").write_text("a user's own")
    write(tmp_path, "a.csv", "b.csv")
    assert names_in(tmp_path) == {"a.csv", "b.csv", "notes.csv"}
    (tmp_path / "tables" / "b.tex").write_text("a user's own")
    write(tmp_path, "a.csv")  # again with the same content
    assert names_in(tmp_path) == {"a.csv", "notes.csv", "b.tex"}
    assert written(tmp_path / "files.json") == [tmp_path / "tables" / "a.csv"]
    write(tmp_path, "a.csv")
    assert names_in(tmp_path) == {"a.csv", "notes.csv", "b.tex"}


def test_a_run_that_fails_removes_nothing_and_the_next_one_knows_what_it_wrote(tmp_path: Path) -> None:
    write(tmp_path, "a.csv")
    with pytest.raises(RuntimeError), rewriting(tmp_path / "files.json", [tmp_path / "tables"]):
        publish(tmp_path / "tables" / "b.csv", b"text")
        raise RuntimeError
    assert names_in(tmp_path) == {"a.csv", "b.csv"}
    write(tmp_path, "c.csv")
    assert names_in(tmp_path) == {"c.csv"}


def test_a_run_that_fails_before_it_writes_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), rewriting(tmp_path / "files.json", [tmp_path / "tables"]):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_is_missed(tmp_path: Path) -> None:
    assert not is_incomplete(tmp_path / "files.json")  # nothing was written yet
    write(tmp_path, "a.csv", "b.csv")
    assert not is_incomplete(tmp_path / "files.json")
    (tmp_path / "tables" / "b.csv").unlink()
    assert is_incomplete(tmp_path / "files.json")


@pytest.mark.parametrize("text", ["", '["tables/a.c', "[1, 2]", "3"])
def test_a_damaged_record_is_one_sentence(tmp_path: Path, text: str) -> None:
    write(tmp_path, "a.csv")
    (tmp_path / "files.json").write_text(text)
    with pytest.raises(BadInput, match=r"files\.json cannot be read .* Remove it and run"):
        write(tmp_path, "b.csv")
    assert names_in(tmp_path) == {"a.csv"}


def test_a_record_from_elsewhere_removes_nothing_outside_the_folders(tmp_path: Path) -> None:
    (tmp_path / "precious.csv").write_text("a user's own")
    (tmp_path / "files.json").write_text('["precious.csv", "tables/../precious.csv", "tables/gone.csv"]')
    write(tmp_path, "a.csv")
    assert (tmp_path / "precious.csv").exists() and names_in(tmp_path) == {"a.csv"}
