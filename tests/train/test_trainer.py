"""Whole runs: resumed ones equal uninterrupted ones, bit for bit, whatever stopped them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from planted import HOOKPOINT, random_store, settings_of, train_arguments

from extract.errors import BadInput
from extract.interrupts import EXIT_INTERRUPTED
from train.checkpoint import Checkpoints
from train.crosscoder import Crosscoder
from train.data import ActivationPairs
from train.engine import Engine
from train.loader import HostSlot
from train.stream import BatchStream
from train.trainer import EXIT_STOPPED, fit, train

ROOT = Path(__file__).resolve().parents[2]


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


def assert_same_run(first, second):
    for file in ("crosscoder/crosscoder.safetensors", "crosscoder/config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert lines_of(first) == lines_of(second)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study folder of an uninterrupted run, in `runs/whole`."""
    study = tmp_path_factory.mktemp("study")
    random_store(study / "store")
    train(settings_of(study), study / "runs" / "whole")
    return study


def test_a_run_writes_what_it_promises(finished):
    run = finished / "runs" / "whole"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "crosscoder", "metrics.jsonl"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000024"]
    crosscoder = Crosscoder.load(run / "crosscoder")
    assert crosscoder.models == ["base", "tuned"]
    assert crosscoder.hookpoint == HOOKPOINT
    assert crosscoder.encode(torch.randn(3, 2, 6)).shape == (3, 32)
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["step"] for line in lines if "val/variance_explained/tuned" in line] == [7, 14, 21, 24]
    expected = {"loss", "reconstruction", "auxk", "delta", "l0", "dead", "threshold", "grad_norm", "lr"}
    assert {f"train/{name}" for name in expected} <= lines[-1].keys()
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"]


def test_a_finished_run_is_not_redone(finished):
    run = finished / "runs" / "whole"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(settings_of(finished), run) == run / "crosscoder"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_finished_run_of_other_settings_is_refused(finished):
    settings = settings_of(finished)
    settings.crosscoder.k = 4
    with pytest.raises(BadInput, match="crosscoder.k: 3 there, 4 now"):
        train(settings, finished / "runs" / "whole")


def test_a_finished_run_on_other_data_is_refused(tmp_path):
    random_store(tmp_path / "store")
    settings = settings_of(tmp_path)
    train(settings, tmp_path / "run")
    shutil.rmtree(tmp_path / "store")
    random_store(tmp_path / "store", seed=1)
    with pytest.raises(BadInput, match="other settings or data.*data: "):
        train(settings, tmp_path / "run")


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, on its own, to be damaged: its settings and its folder."""
    shutil.copytree(finished / "store", tmp_path / "store")
    shutil.copytree(finished / "runs" / "whole", tmp_path / "runs" / "whole")
    return settings_of(tmp_path), tmp_path / "runs" / "whole"


def damage(path):
    """One flipped bit: the size and the format stay right."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", ["deleted", "without weights", "damaged weights", "damaged config"])
def test_a_lost_crosscoder_is_published_again_from_the_last_checkpoint(copied, finished, monkeypatch, what):
    settings, run = copied
    monkeypatch.setattr(BatchStream, "rows", lambda stream, step: pytest.fail("a step was trained again"))
    if what == "deleted":
        shutil.rmtree(run / "crosscoder")
    elif what == "without weights":
        (run / "crosscoder" / "crosscoder.safetensors").unlink()
    elif what == "damaged weights":
        damage(run / "crosscoder" / "crosscoder.safetensors")
    else:
        (run / "crosscoder" / "config.json").write_text("{")
    train(settings, run)
    assert_same_run(run, finished / "runs" / "whole")


def test_a_finished_run_without_checkpoints_is_still_checked(copied):
    settings, run = copied
    shutil.rmtree(run / "checkpoints")
    assert train(settings, run) == run / "crosscoder"
    assert not (run / "checkpoints").exists()
    settings.training.lr = 0.5
    with pytest.raises(BadInput, match="crosscoder was trained with other settings.*training.lr: 0.01 there, 0.5 now"):
        train(settings, run)


def test_a_crosscoder_from_before_weights_were_recorded_is_finished(copied):
    settings, run = copied
    config = json.loads((run / "crosscoder" / "config.json").read_text())
    assert config["trained_with"].pop("weights") == {"base": {}, "tuned": {}}  # a store that does not say them
    (run / "crosscoder" / "config.json").write_text(json.dumps(config))
    assert train(settings, run) == run / "crosscoder"
    assert json.loads((run / "crosscoder" / "config.json").read_text()) == config


def test_a_run_of_which_all_is_gone_says_so_and_is_trained_again(copied, finished, caplog):
    settings, run = copied
    shutil.rmtree(run / "checkpoints")
    damage(run / "crosscoder" / "crosscoder.safetensors")
    train(settings, run)
    assert "crosscoder.safetensors is missing or damaged" in caplog.text
    assert "no checkpoint is left: training starts anew" in caplog.text
    assert_same_run(run, finished / "runs" / "whole")


def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(copied, finished, caplog):
    settings, run = copied
    shutil.rmtree(run / "crosscoder")
    damage(run / "checkpoints" / "step-00000024" / "state-00000-of-00001.safetensors")
    train(settings, run)
    assert "Ignoring the damaged checkpoint" in caplog.text and "step-00000024" in caplog.text
    assert_same_run(run, finished / "runs" / "whole")


@pytest.mark.parametrize("at", [3, 12])
def test_a_crash_mid_run_costs_only_the_steps_since_the_checkpoint(finished, monkeypatch, at):
    run = finished / "runs" / f"crash{at}"
    take, taken = HostSlot.take, itertools.count()

    def failing(slot):
        if next(taken) == at:
            raise RuntimeError("power cut")
        return take(slot)

    monkeypatch.setattr(HostSlot, "take", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings_of(finished), run)
    assert not (run / "crosscoder").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "cut in the mid')
    monkeypatch.setattr(HostSlot, "take", take)
    train(settings_of(finished), run)
    assert_same_run(run, finished / "runs" / "whole")


def steps_saved(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_an_error_of_the_data_costs_no_step(finished, monkeypatch):
    """Steps 13 and, in a second start that never comes to a step, none: nothing is saved twice."""
    run, saves = finished / "runs" / "data_error", []
    take, taken, save = HostSlot.take, itertools.count(), Checkpoints.save

    def failing(slot):
        if next(taken) >= 12:
            raise OSError("the disk is gone")
        return take(slot)

    with monkeypatch.context() as patched:
        patched.setattr(HostSlot, "take", failing)
        patched.setattr(Checkpoints, "save", lambda self, state: (saves.append(state.values), save(self, state)))
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                train(settings_of(finished), run)
    assert steps_saved(run) == [10, 12] and [values["steps_done"] for values in saves] == [5, 10, 12]
    train(settings_of(finished), run)
    assert_same_run(run, finished / "runs" / "whole")


def test_an_error_before_the_first_step_saves_nothing(finished, monkeypatch):
    def failing(slot):
        raise OSError("no data")

    run = finished / "runs" / "no_step"
    monkeypatch.setattr(HostSlot, "take", failing)
    with pytest.raises(OSError, match="no data"):
        train(settings_of(finished), run)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(("at", "expected"), [(14, [10, 14]), (24, [15, 20])])
def test_an_error_of_a_validation_costs_no_step_but_is_not_passed_over_in_the_end(finished, monkeypatch, at, expected):
    run, evaluate = finished / "runs" / f"validation{at}", Engine.evaluate

    def failing(engine, batches, recovered):
        if engine.steps_done == at:
            raise OSError("the disk is gone")
        return evaluate(engine, batches, recovered)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "evaluate", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            train(settings_of(finished), run)
    assert steps_saved(run) == expected
    train(settings_of(finished), run)
    lines, whole = lines_of(run), lines_of(finished / "runs" / "whole")
    if at == 14:  # of this step, only its validation is missing
        whole[13] = {name: value for name, value in whole[13].items() if not name.startswith("val/")}
    assert lines == whole
    weights = "crosscoder/crosscoder.safetensors"
    assert (run / weights).read_bytes() == (finished / "runs" / "whole" / weights).read_bytes()


def test_logging_validation_and_checkpoints_do_not_change_the_result(finished):
    settings = settings_of(finished)
    settings.training.log_every, settings.training.validate_every, settings.training.checkpoint_every = 10, 0, 0
    train(settings, finished / "runs" / "quiet")
    for file in ("crosscoder/crosscoder.safetensors", "crosscoder/config.json"):
        assert (finished / "runs" / "quiet" / file).read_bytes() == (finished / "runs" / "whole" / file).read_bytes()
    assert [line["step"] for line in lines_of(finished / "runs" / "quiet")] == [10, 20, 24]


def test_resuming_with_other_settings_is_refused(finished):
    settings = settings_of(finished)
    run = finished / "runs" / "changed"
    (run / "checkpoints").mkdir(parents=True)
    (finished / "runs" / "whole" / "checkpoints" / "step-00000020").rename(run / "checkpoints" / "step-00000020")
    settings.training.lr = 0.5
    with pytest.raises(BadInput, match="training.lr: 0.01 there, 0.5 now"):
        train(settings, run)


def test_divergence_stops_before_the_update_and_names_the_batch(finished, monkeypatch):
    run = finished / "runs" / "diverged"
    take, taken = HostSlot.take, itertools.count()

    def failing(slot):
        x_BMD, token_B = take(slot)
        return x_BMD * (float("nan") if next(taken) == 12 else 1), token_B

    monkeypatch.setattr(HostSlot, "take", failing)
    with pytest.raises(BadInput, match=r"step 12 \(tokens 384 to 416 of the run, epoch 1\).*training.lr=0.01"):
        train(settings_of(finished), run)
    about = json.loads((run / "diverged.json").read_text())
    assert (about["step"], about["entries"], about["epoch"]) == (12, [384, 416], 1)
    assert "not finite" in about["reason"]
    pairs = ActivationPairs.open(settings_of(finished))
    starts = dict(zip(pairs.tokens.keys, pairs.tokens.row_starts.tolist(), strict=False))
    rows = [starts[key] + position for key, positions in about["documents"].items() for position in positions]
    assert sorted(rows) == BatchStream(pairs, 0, 32, settings_of(finished).data).rows(12).tolist()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    assert not (run / "crosscoder").exists()


def test_fit_is_short():
    source = fit.__code__
    assert max(line for *_, line in source.co_lines() if line) - source.co_firstlineno <= 60


STEPS = 400


def command(study, *overrides):
    return [sys.executable, *train_arguments(study, 32 * STEPS), *overrides]


def start(study, *overrides, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(study, *overrides),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def only_run(study):
    (run,) = (study / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    study = tmp_path_factory.mktemp("uninterrupted")
    random_store(study / "store")
    process = start(study)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == f"crosscoder: {only_run(study) / 'crosscoder'}"
    (study / "log.txt").write_text(errors)
    return study


def test_a_log_file_has_a_line_for_every_validation(uninterrupted):
    """Where there is no terminal, there is no bar either."""
    told = [line for line in (uninterrupted / "log.txt").read_text().splitlines() if line.startswith("step ")]
    measured = [line for line in lines_of(only_run(uninterrupted)) if "val/variance_explained/tuned" in line]
    assert [line.split(":")[0] for line in told] == [f"step {line['step']} of {STEPS}" for line in measured]
    *numbers, speed = re.findall(r"-?[\d.]+", told[-1].split(":")[1].replace(",", ""))
    names = ("train/loss", "val/variance_explained/base", "val/variance_explained/tuned")
    assert float(speed) > 0 and [float(number) for number in numbers] == pytest.approx(
        [measured[-1][name] for name in names], rel=1e-3
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_mid_run_and_a_second_start_equal_an_uninterrupted_run(uninterrupted, tmp_path, number):
    random_store(tmp_path / "store")
    process = start(tmp_path)
    while not (tmp_path / "runs").exists() or len(list(tmp_path.glob("runs/*/checkpoints/step-????????"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    steps = max(int(path.name[5:]) for path in only_run(tmp_path).glob("checkpoints/step-????????"))
    assert steps < STEPS
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_STOPPED), errors
    process = start(tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"step-{steps:08d}" in errors  # where it resumed
    assert_same_run(only_run(tmp_path), only_run(uninterrupted))


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_signal_while_data_is_waited_for_is_honoured_at_once(finished, tmp_path, monkeypatch, steps_before):
    """The data of a later step does not come before it is given up; the run then continues where it was."""
    random_store(tmp_path / "store")
    read, given_up, reads = ActivationPairs.read, threading.Event(), []

    def slow(pairs, rows_B, into):
        reads.append(rows_B)
        if len(reads) > 1 + steps_before:  # the first is for the initial weights
            time.sleep(0.5)  # the steps before are done
            os.kill(os.getpid(), signal.SIGINT)
            assert given_up.wait(60)
            raise CancelledError
        read(pairs, rows_B, into)

    with monkeypatch.context() as patched:
        patched.setattr(ActivationPairs, "read", slow)
        patched.setattr(ActivationPairs, "expect", lambda pairs, spans: spans or given_up.set())
        with pytest.raises(SystemExit) as stopped:
            train(settings_of(tmp_path), tmp_path / "run")
    assert stopped.value.code == EXIT_STOPPED
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{steps_before:08d}"]
    train(settings_of(tmp_path), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished / "runs" / "whole")


def test_a_sweep_leaves_its_runs_and_its_settings_and_nothing_empty(tmp_path):
    random_store(tmp_path / "store")
    short = ["training.num_tokens=320", "training.validate_every=0", "training.checkpoint_every=0"]
    process = start(tmp_path, "crosscoder.k=3,4", "seed=0,1", *short, "-m")
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["multirun.yaml", "runs", "store", "sweeps"]
    assert len(list((tmp_path / "runs").glob("*/crosscoder/config.json"))) == 4
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and not any(path.iterdir())]


# Jobs that a shell starts in the background ignore the signal, and so would their children.
PRESS_CTRL_C = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("module", ["train", "analysis", "analysis.compare", "demo"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, module):
    """A stand-in for omegaconf, which all of them import, presses Ctrl-C."""
    (tmp_path / "omegaconf.py").write_text(PRESS_CTRL_C)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_INTERRUPTED
    assert done.stderr.strip().startswith("interrupted: ") and done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("module", ["train", "extract.tokens"])
def test_ctrl_c_while_hydra_composes_is_one_line(tmp_path, module):
    """A stand-in for Hydra's last step before the command presses Ctrl-C."""
    (tmp_path / "press_ctrl_c.py").write_text(PRESS_CTRL_C)
    (tmp_path / "sitecustomize.py").write_text(
        "import hydra._internal.hydra as h\nh.Hydra.run = lambda *args, **named: __import__('press_ctrl_c')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", module, "experiment=demo/base_simpo", f"outputs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_INTERRUPTED
    assert done.stderr.strip().startswith("interrupted: ") and done.stderr.strip().count("\n") == 0


def test_bad_input_is_one_line_and_status_2(uninterrupted):
    process = start(uninterrupted, "hookpoint=block9")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: There are no activations of model base at hookpoint=block9")
    assert errors.count("\n") == 1
