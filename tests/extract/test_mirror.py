"""The process that mirrors metrics.jsonl to W&B: one run with every step once, and nothing that reaches the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extract.errors import BadInput
from extract.metrics_file import Histogram, MetricsFile
from extract.mirror import STOPPED, Job, Mirror, TrackingConfig, mode_of, run_id, slurm_job
from extract.mirroring import new_lines
from tests.disks import small_disk
from tests.wandb_files import isolate, offline_parts
from tests.wandb_stub import StubServer


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user whom W&B does not know, and who is in no hurry: the machine may be busy."""
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr("extract.mirror.HURRY_S", 300.0)


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_MODE": "online"}, "online"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        (None, {"WANDB_MODE": "nonsense"}, "offline"),
        (None, {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "online"),
    ],
)
def test_a_setting_decides_before_the_environment(mode: str | None, environment: dict[str, str], expected: str):
    assert mode_of(TrackingConfig(mode=mode), environment) == expected


@pytest.mark.parametrize("wrong", [{"mode": "on"}, {"start_timeout_s": 0.0}, {"max_artifact_gb": -1.0}])
def test_settings_that_cannot_be_are_named(wrong: dict):
    with pytest.raises(BadInput, match=f"tracking.{next(iter(wrong))}="):
        TrackingConfig(**wrong).check()


def test_disabled_tracking_writes_nothing(tmp_path: Path):
    mirror = Mirror(TrackingConfig(mode="disabled"), tmp_path / "run", "name", "train", "study", {})
    mirror.show({"a": 1.0})
    mirror.artifact("a", "b", {})
    mirror.end(0)
    assert not (tmp_path / "run").exists()


def test_a_folder_keeps_its_run(tmp_path: Path):
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first != run_id(tmp_path / "b") and len(first) == 16


def test_slurm_says_which_job_it_is():
    environment = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "3", "SLURM_X": "y"}
    assert slurm_job(environment) == {"job_id": "12", "nodes": "n[1-2]", "restart_count": "3"}
    assert slurm_job({}) == {}


def test_lines_are_read_when_they_are_whole(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    lines = new_lines(Job(TrackingConfig(), "i", "n", "train", "g", "", str(path), {}, {}), last_step=1)
    assert next(lines) == [{"step": 2}] and next(lines) == []
    with path.open("a") as file:
        file.write('ep": 3}\n{"step": 4}')
    assert next(lines) == [{"step": 3}]


def test_a_process_that_cannot_be_started_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "run").write_text("a file where the folder should be")
    mirror = Mirror(TrackingConfig(mode="offline"), tmp_path / "run", "name", "train", "study", {})
    mirror.show({"a": 1.0})
    mirror.end(0)
    assert "W&B cannot be started ([Errno 20] Not a directory" in caplog.text


class Command:
    """A command that logs steps [first, last] in `folder`, having saved the steps before; `end` ends it."""

    def __init__(self, folder: Path, first: int, last: int, mode: str, start_timeout_s: float = 300.0):
        config = TrackingConfig(mode=mode, start_timeout_s=start_timeout_s, end_timeout_s=300.0)
        path = folder / "metrics.jsonl"
        self.file = MetricsFile(path, first - 1)
        self.mirror = Mirror(
            config, folder, "a name", "train", "study", {"crosscoder": {"k": 3}}, path, {"val/*": "max"}
        )
        self.log(first, last)

    def log(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.file.log(step, {"train/loss": 1 / step, "train/bad": float("nan"), "val/h": Histogram([0, 1], [step])})

    def end(self, status: int) -> float:
        """Seconds that it waited."""
        self.file.close()
        start = time.monotonic()
        self.mirror.end(status)
        return time.monotonic() - start


@pytest.mark.slow
def test_offline_parts_have_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first command was killed after step 20, having saved the 15th: steps 16 to 20 are computed again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    Command(tmp_path, 1, 20, "offline").end(STOPPED)
    second = Command(tmp_path, 16, 30, "offline")
    second.mirror.artifact("a crosscoder,k=3", "crosscoder", {"m.jsonl": tmp_path / "metrics.jsonl"})
    second.end(0)
    first, second_part = offline_parts(tmp_path)
    assert first.run_id == second_part.run_id == run_id(tmp_path)
    assert [row["step"] for row in first.history] == [*range(1, 21)] == [row["_step"] for row in first.history]
    assert [row["step"] for row in second_part.history] == [*range(21, 31)]
    assert second_part.history[0]["train/loss"] == 1 / 21 and "train/bad" not in second_part.history[0]
    assert second_part.history[0]["val/h.values"] == [21] and second_part.history[0]["val/h.bins"] == [0, 1]
    assert first.config["crosscoder"] == {"k": 3} and first.config["slurm"] == {"job_id": "7"}
    assert {"commit", "dirty"} == first.config["git"].keys()
    assert (first.run["run_group"], first.run["job_type"], first.run["display_name"]) == ("study", "train", "a name")
    assert first.preempting and first.exit_code == STOPPED and second_part.exit_code == 0
    assert [artifact["name"] for artifact in second_part.artifacts] == ["a-crosscoder-k-3"]


@pytest.mark.slow
def test_offline_parts_are_uploaded_as_one_run(tmp_path: Path):
    """By `wandb sync`, as the README has it; done twice it uploads nothing again."""
    Command(tmp_path, 1, 20, "offline").end(STOPPED)
    second = Command(tmp_path, 16, 30, "offline")
    second.mirror.artifact("a", "b", {"m.jsonl": tmp_path / "metrics.jsonl"})
    second.end(0)
    with StubServer() as server:
        command = [sys.executable, "-m", "wandb", "sync", *sorted(map(str, tmp_path.glob("wandb/offline-run-*")))]
        for _ in range(2):
            done = subprocess.run(command, env=os.environ | server.environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    ((name, run),) = server.runs.items()
    assert name == run_id(tmp_path) and run.exit_code == 0 and len(server.artifacts) == 1
    assert [row["step"] for row in run.history] == [*range(1, 31)] == [row["_step"] for row in run.history]


def point_to(monkeypatch: pytest.MonkeyPatch, server: StubServer) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["online", "offline"])
def test_an_online_run_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str):
    """Also where the first command was tracked offline: then `wandb sync` is told that its part is not needed."""
    with StubServer() as server:
        point_to(monkeypatch, server)
        Command(tmp_path, 1, 20, before).end(STOPPED)
        second = Command(tmp_path, 16, 30, "online")
        second.mirror.artifact("a crosscoder,k=3", "crosscoder", {"m.jsonl": tmp_path / "metrics.jsonl"})
        second.end(0)
    run = server.runs[run_id(tmp_path)]
    assert len(server.runs) == 1
    assert [row["step"] for row in run.history] == [*range(1, 31)] == [row["_step"] for row in run.history]
    assert run.exit_code == 0 and run.config["crosscoder"] == {"k": 3} and run.variables["groupName"] == "study"
    (artifact,) = server.artifacts
    assert artifact["committed"] and artifact["artifactCollectionName"] == "a-crosscoder-k-3"
    assert any(body == (tmp_path / "metrics.jsonl").read_bytes() for body in server.files.values())
    synced = [*tmp_path.glob("wandb/offline-run-*/run-*.wandb.synced")]
    assert len(synced) == (before == "offline")


@pytest.mark.slow
@pytest.mark.parametrize("obstacle", ["no login", "no server", "a server that never answers"])
def test_a_run_that_cannot_be_online_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], obstacle: str
):
    with StubServer(hangs=True) as server:
        if obstacle != "no login":
            point_to(monkeypatch, server)
        if obstacle == "no server":
            server.kill()
        # Long enough for W&B's reply that there is no login, short for what does not reply.
        limit_s = 120.0 if obstacle == "no login" else 5.0
        Command(tmp_path, 1, 20, "online", limit_s).end(0)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("W&B: ") and line.endswith(
        f"This run is tracked offline. To upload it later: wandb sync {tmp_path}/wandb/offline-run-*-{run_id(tmp_path)}"
    )
    assert "wandb login" in line or obstacle != "no login"
    (part,) = offline_parts(tmp_path)
    assert [row["step"] for row in part.history] == [*range(1, 21)] and part.exit_code == 0


@pytest.mark.slow
def test_a_server_that_dies_costs_a_limited_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    with StubServer() as server:
        point_to(monkeypatch, server)
        command = Command(tmp_path, 1, 20, "online")
        server.wait(lambda: any(run.lines for run in server.runs.values()), 300)
    command.log(21, 40)
    command.mirror._config.end_timeout_s = 3.0
    command.mirror._config.start_timeout_s = 60.0
    assert command.end(0) < 68
    assert "W&B: Not all was uploaded within 3 s. To do so later: wandb sync --include-online" in capfd.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40


@pytest.mark.slow
def test_a_full_disk_of_wandb_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """W&B itself says nothing, and its file is cut short."""
    with small_disk(tmp_path / "disk", 64) as disk:
        monkeypatch.setenv("WANDB_DIR", str(disk))
        command = Command(tmp_path / "run", 1, 2000, "offline")
        command.mirror._config.end_timeout_s = 20.0
        command.end(0)
    assert f"W&B: The disk of {disk / 'wandb'}" in capfd.readouterr().err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2000


@pytest.mark.slow
def test_what_is_left_of_a_killed_command_ends_by_itself(tmp_path: Path):
    """Its process ends the run as failed, with all that was logged."""
    code = (
        "import os; from pathlib import Path; from tests.extract.test_mirror import Command;"
        f"command = Command(Path({str(tmp_path)!r}), 1, 20, 'offline'); print(command.mirror._process.pid, flush=True);"
        "os._exit(9)"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "extract")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 9
    deadline = time.monotonic() + 200
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (part,) = offline_parts(tmp_path)
    assert [row["step"] for row in part.history] == [*range(1, 21)] and part.exit_code == 1
