"""A pass that is killed or stopped goes on, and its outputs are, byte for byte, those of one left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.config import AnalysisSettings
from analysis.firings.reading import TokenBatch
from analysis.latents.activity import Activity
from analysis.latents.one_pass import LatentPass, state_folder
from analysis.latents.state import SPOOL_FILE, STATE_FILE
from analysis.latents.step import OUTPUTS, write_latents
from extract.errors import BadInput
from tests.analysis.random_study import make_study, settings_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, with `whole`, an analysis that nothing interrupted."""
    root = tmp_path_factory.mktemp("study")
    write_latents(make_study(root), root / "crosscoder", root / "whole")
    return root


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A command that was asked to stop ignores SIGUSR1 until it ends; tests go on."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def outputs_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def states(output: Path) -> list[Path]:
    return list(state_folder(output).glob(f"*/{STATE_FILE}"))


def start(root: Path, output: Path, seconds: float) -> subprocess.Popen:
    script = ROOT / "tests" / "analysis" / "random_study.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, script, root, output, str(seconds)], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for_state(output: Path, process: subprocess.Popen) -> None:
    while not states(output):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_killed_processes_and_a_rerun_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    """Two SIGKILLs at random moments, saving included: a state is saved after every batch."""
    rng = random.Random(0)
    for _ in range(2):
        process = start(study, tmp_path, 0.01)
        wait_for_state(tmp_path, process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
    assert not (tmp_path / "latents.parquet").exists()  # killed mid-pass
    process = start(study, tmp_path, 0)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert "latents: goes on after" in said
    assert outputs_in(tmp_path) == outputs_in(study / "whole")
    assert len(states(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_before_it_interrupts(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """After the third batch; the rerun begins with the fourth."""
    seen: list[int] = []
    add = LatentPass.add

    def note(self: LatentPass, batch: TokenBatch) -> None:
        seen.append(self.next_batch)
        add(self, batch)
        if len(seen) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(LatentPass, "add", note)
    with pytest.raises(KeyboardInterrupt):
        write_latents(settings_of(study), study / "crosscoder", tmp_path)
    write_latents(settings_of(study), study / "crosscoder", tmp_path)
    assert seen == list(range(len(seen))) and len(seen) > 10
    assert outputs_in(tmp_path) == outputs_in(study / "whole")


def stopped_after_three_batches(settings: AnalysisSettings, study: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        add = LatentPass.add

        def stop(self: LatentPass, batch: TokenBatch) -> None:
            add(self, batch)
            if self.next_batch == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(LatentPass, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            write_latents(settings, study / "crosscoder", folder)


def test_a_state_holds_all_of_its_batches(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the last one, part of which a thread is still adding."""
    add = Activity.add

    def slow_add(self: Activity, *batch: Any) -> None:
        time.sleep(0.05)
        add(self, *batch)

    monkeypatch.setattr(Activity, "add", slow_add)
    stopped_after_three_batches(settings_of(study), study, tmp_path)
    write_latents(settings_of(study), study / "crosscoder", tmp_path)
    assert outputs_in(tmp_path) == outputs_in(study / "whole")


@pytest.mark.parametrize("change", ["owner", "examples", "groups", "nulls", "batches", "kept", "data"])
def test_a_state_of_other_settings_is_kept_until_the_new_pass_has_finished(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """It is not used, and what differs is said."""
    before = settings_of(study)
    if change == "owner":
        before.analysis.owner.delta_norm_low = before.analysis.owner.shared_low = 0.0
        before.analysis.owner.shared_high = before.analysis.owner.delta_norm_high = 1.0
        # so that of two rows of any norms none is one model's alone; dedicated latents stay
        before.analysis.examples.sampled = "held"
    elif change == "data":
        before = make_study(tmp_path / "other", num_documents=71)
    elif change == "groups":
        before.analysis.intervals.groups = 9
    elif change == "nulls":
        before.analysis.nulls.seed = 1
    elif change == "examples":
        before.analysis.examples.seed = 1
    elif change == "kept":
        before.kept.skip_first_tokens = 2
    else:
        before.analysis.batch_tokens = 30
    output = tmp_path / "output"
    stopped_after_three_batches(before, study, output)
    old = states(output)
    stopped_after_three_batches(settings_of(study), study, output)
    expected = {"owner": "examples, owner"}.get(change, change)
    assert f"{old[0].parent} belongs to a pass with other settings or inputs ({expected})." in caplog.text
    assert len(states(output)) == 2 and set(old) < set(states(output))
    assert batches_of(lambda: write_latents(settings_of(study), study / "crosscoder", output))[0] == 3
    assert outputs_in(output) == outputs_in(study / "whole")
    assert len(states(output)) == 1 and not set(old) & set(states(output))


def batches_of(work: Callable[[], object]) -> list[int]:
    """The numbers of the batches that are read while `work` is done."""
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        add = LatentPass.add

        def note(self: LatentPass, batch: TokenBatch) -> None:
            seen.append(self.next_batch)
            add(self, batch)

        patch.setattr(LatentPass, "add", note)
        work()
    return seen


def thresholds(settings: AnalysisSettings) -> None:
    settings.analysis.owner.max_nu_error = 0.3
    settings.analysis.owner.max_nu_reconstruction = 0.6
    settings.analysis.owner.max_nu_reconstruction_dedicated = 0.6
    settings.analysis.owner.duplicate_cosine = 0.5
    settings.analysis.intervals.confidence = 0.5
    settings.analysis.intervals.resamples = 20
    settings.analysis.intervals.seed = 3


def test_thresholds_and_intervals_do_not_read_the_store_again(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are those of a whole pass with these settings, in a folder of its own; so are deleted files."""
    write_latents(settings_of(study), study / "crosscoder", tmp_path / "here")
    changed = settings_of(study)
    thresholds(changed)
    assert batches_of(lambda: write_latents(changed, study / "crosscoder", tmp_path / "here")) == []
    assert "nothing to read" in capsys.readouterr().err
    assert len(batches_of(lambda: write_latents(changed, study / "crosscoder", tmp_path / "fresh"))) > 10
    assert outputs_in(tmp_path / "here") == outputs_in(tmp_path / "fresh") != outputs_in(study / "whole")
    for name in OUTPUTS:
        (tmp_path / "here" / name).unlink()
    assert batches_of(lambda: write_latents(settings_of(study), study / "crosscoder", tmp_path / "here")) == []
    assert outputs_in(tmp_path / "here") == outputs_in(study / "whole")


def test_a_second_process_is_told_to_wait(study: Path, tmp_path: Path) -> None:
    """The lock is of the process that holds it: after a kill the next one goes on."""
    process = start(study, tmp_path, 5)
    wait_for_state(tmp_path, process)
    with pytest.raises(BadInput, match=f"being analysed by another process .process {process.pid} on .*Wait for it"):
        write_latents(settings_of(study), study / "crosscoder", tmp_path)
    assert len(states(tmp_path)) == 1
    process.kill()
    process.wait()
    assert batches_of(lambda: write_latents(settings_of(study), study / "crosscoder", tmp_path))[0] > 0
    assert outputs_in(tmp_path) == outputs_in(study / "whole")


@pytest.mark.parametrize("damage", ["state", "spool"])
def test_a_damaged_state_is_not_used(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    stopped_after_three_batches(settings_of(study), study, tmp_path)
    [path] = states(tmp_path)
    if damage == "state":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.with_name(SPOOL_FILE).unlink()
    write_latents(settings_of(study), study / "crosscoder", tmp_path)
    assert "is damaged" in caplog.text
    assert outputs_in(tmp_path) == outputs_in(study / "whole")


def test_no_state_is_a_pickle(study: Path, tmp_path: Path) -> None:
    stopped_after_three_batches(settings_of(study), study, tmp_path)
    [path] = states(tmp_path)
    header = path.read_bytes()[8:9]
    assert header == b"{"  # safetensors: the length of a JSON header, then the header
    assert {path.name for path in path.parent.iterdir()} == {STATE_FILE, "maxima.rows"}
