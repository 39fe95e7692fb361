"""metrics.jsonl and W&B."""

from __future__ import annotations

import json
import logging
import math
import time

from train.config import TrackingConfig
from train.tracking import MetricsFile, WandbRun


def test_lines_are_kept_up_to_the_step_that_is_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.log(step, {"loss": step / 2, "bad": math.nan})
    file.close()
    file = MetricsFile(path, 2)
    file.log(3, {"loss": 9.0})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "bad": None},
        {"step": 2, "loss": 1.0, "bad": None},
        {"step": 3, "loss": 9.0},
    ]


def test_a_run_without_checkpoint_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_offline_tracking_writes_beside_the_run(tmp_path):
    run = WandbRun(TrackingConfig(mode="offline"), tmp_path, "name", "study", {"crosscoder": {"k": 3}})
    run.log(1, {"train/loss": 0.5})
    run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"train/loss" not in file.read_bytes():  # W&B's own process writes it, maybe after `finish` returned
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failure_of_tracking_is_logged_and_ends_only_the_tracking(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = WandbRun(TrackingConfig(mode="offline", project="no/such:project"), tmp_path, "name", "study", {})
    assert "the run goes on with metrics.jsonl alone" in caplog.text
    run.log(1, {"train/loss": 0.5})
    run.finish()


def test_disabled_tracking_writes_nothing(tmp_path):
    run = WandbRun(TrackingConfig(mode="disabled"), tmp_path, "name", "study", {})
    run.log(1, {"train/loss": 0.5})
    run.finish()
    assert list(tmp_path.iterdir()) == []
