"""A training run on W&B: stopped, continued and read back; with a server that dies on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from planted import random_store, settings_of

from extract.mirror import TrackingConfig
from tests.wandb_files import isolate, offline_parts, promised
from tests.wandb_stub import StubServer
from train.metric_table import EVERY, VALIDATION
from train.stops import EXIT_STOPPED
from train.tracking import Tracker, manifests_of
from train.trainer import train


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user whom W&B does not know."""
    isolate(monkeypatch, tmp_path)


def test_manifests_are_named():
    assert manifests_of(["base", "tuned"], ["1", "2", "3"]) == {"tokens": "1", "base": "2", "tuned": "3"}


@pytest.mark.slow
def test_a_run_that_was_stopped_is_one_run_with_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    random_store(tmp_path / "store")
    settings = settings_of(tmp_path)
    settings.tracking.mode, settings.tracking.end_timeout_s = "offline", 300.0
    settings.tracking.start_timeout_s = 300.0
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    log = Tracker.log

    def stopping(tracker: Tracker, step: int, metrics: dict) -> None:
        log(tracker, step, metrics)
        if step == 10:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(Tracker, "log", stopping)
        patched.setattr("extract.mirror.HURRY_S", 300.0)
        train(settings, tmp_path / "run")
    assert stopped.value.code == EXIT_STOPPED
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(settings, tmp_path / "run")
    parts = offline_parts(tmp_path / "run")
    assert len({part.run_id for part in parts}) == 1 and len(parts) == 2
    rows = [row for part in parts for row in part.history]
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == [*range(1, 25)]
    assert all(promised(EVERY, row) for row in rows)
    assert [row["step"] for row in rows if promised(VALIDATION, row)] == [7, 14, 21, 24]
    assert [part.exit_code for part in parts] == [EXIT_STOPPED, 0] and parts[0].preempting
    config = parts[1].config
    assert config["crosscoder"]["k"] == 3 and config["slurm"] == {"job_id": "12", "restart_count": "1"}
    assert config["manifests"].keys() == {"tokens", "base", "tuned"} and config["units"]["train/lr"] == "1"
    (artifact,) = parts[1].artifacts
    assert artifact["name"] == "crosscoder-planted-run" and artifact["type"] == "crosscoder"


@pytest.mark.slow
def test_a_server_that_dies_mid_run_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """It dies after step 10, with the first steps; what follows is in metrics.jsonl, and the crosscoder is there."""
    random_store(tmp_path / "store")
    settings = settings_of(tmp_path)
    settings.tracking = TrackingConfig(mode="online", start_timeout_s=200.0, end_timeout_s=2.0)
    log = Tracker.log
    with StubServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        def killing(tracker: Tracker, step: int, metrics: dict) -> None:
            log(tracker, step, metrics)
            if step == 10:
                server.wait(lambda: any(run.lines for run in server.runs.values()), 200)
                server.kill()

        monkeypatch.setattr(Tracker, "log", killing)
        crosscoder = train(settings, tmp_path / "run")
    said = capfd.readouterr().err
    assert "Not all was uploaded within 2 s" in said and "wandb sync" in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 24
    assert (crosscoder / "config.json").exists()
