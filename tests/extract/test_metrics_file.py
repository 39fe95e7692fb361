"""metrics.jsonl: what it holds, what is left when a run continues, and that a full disk ends nothing."""

from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from extract.metrics_file import Histogram, MetricsFile


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_kept_up_to_the_step_that_is_resumed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.log(step, {"loss": step / 2, "bad": math.nan})
    file.close()
    file = MetricsFile(path, 2)
    file.log(3, {"loss": 9.0})
    file.close()
    assert lines_of(path) == [
        {"step": 1, "loss": 0.5, "bad": None},
        {"step": 2, "loss": 1.0, "bad": None},
        {"step": 3, "loss": 9.0},
    ]


def test_a_run_without_checkpoint_starts_with_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_histograms_have_edges_and_counts(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log(7, {"val/x": Histogram([0.0, 0.5, 1.0], [3, 4])})
    file.close()
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 7, "val/x": {"edges": [0.0, 0.5, 1.0], "counts": [3, 4]}}]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond, as on a full disk: a write stops in the middle, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.log(1, {"loss": 1.0})
    with caplog.at_level(logging.WARNING), files_of_at_most(path.stat().st_size + 9):
        file.log(2, {"loss": 2.0})
        file.log(3, {"loss": 3.0})
        file.sync()
    assert path.read_text().endswith('}\n{"step": ') and len(caplog.records) == 1
    assert "metrics.jsonl: File too large. The run goes on" in caplog.text
    file.log(4, {"loss": 4.0})
    file.close()
    assert lines_of(path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]


def test_a_disk_that_stays_full_ends_nothing(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    with files_of_at_most(0):
        file.log(1, {"loss": 1.0})
        file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
