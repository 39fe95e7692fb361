"""A killed run continues as if nothing had happened, on other ranks and with another engine, too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launched import NUM_STEPS, Launch, differences, last_step, lines_of
from planted import random_store

from train.crosscoder import Crosscoder

ROOT = Path(__file__).resolve().parents[2]
ENGINES = [("single", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("latent", 2), ("latent", 3), ("latent", 4)]
# Of free-running steps, between engines and numbers of ranks: what rounding differs by grows over 40 steps.
FLOAT64, FLOAT32 = 1e-11, 1e-3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study folder with the uninterrupted runs of one process, `runs/float64` and `runs/float32`."""
    folder = tmp_path_factory.mktemp("study")
    random_store(folder / "store")
    for name in ("float64", "float32"):
        Launch(folder, name, "single", 1, getattr(torch, name)).finish()
    return folder


def assert_same_curve(run, reference, tolerance):
    """Every step is there once, with the metrics of the uninterrupted run."""
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    different = differences(lines, lines_of(reference))
    assert max(different.values()) <= tolerance, different
    ours, theirs = (Crosscoder.load(folder / "crosscoder") for folder in (run, reference))
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=tolerance, atol=tolerance)


def test_the_tolerance_tells_apart_what_must_not_be_taken_for_equal(study):
    """Losses of neighbouring steps differ by far more than the tolerance: a step repeated or left out would show."""
    for reference, tolerance in (("float64", FLOAT64), ("float32", FLOAT32)):
        losses = [line["train/loss"] for line in lines_of(study / "runs" / reference)]
        nearest = min(abs(a - b) / a for a, b in zip(losses, losses[1:], strict=False))
        assert nearest > 2 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_one_rank_is_killed_at_a_random_step_and_others_continue(study, seed):
    """Two kills, between engines and numbers of ranks drawn at random: float64, so that rounding hides nothing."""
    choice = random.Random(seed)
    (first, second, last), steps = choice.choices(ENGINES, k=3), sorted(choice.sample(range(1, NUM_STEPS - 8), 2))
    run = study / "runs" / f"trial{seed}"
    for (engine, num_ranks), step in zip((first, second), steps, strict=True):
        launch = Launch(study, run.name, engine, num_ranks, torch.float64)
        launch.kill_one(choice.randrange(num_ranks), step, choice.uniform(0.0, 0.03))
    Launch(study, run.name, *last, torch.float64).finish()
    assert_same_curve(run, study / "runs" / "float64", FLOAT64)


@pytest.mark.slow
def test_every_engine_continues_another(study):
    chain = [("fsdp", 4), ("latent", 2), ("single", 1), ("deepspeed", 2), ("fsdp", 2), ("deepspeed", 4)]
    run = study / "runs" / "chain"
    for step, (engine, num_ranks) in enumerate(chain[:-1], start=1):
        Launch(study, run.name, engine, num_ranks).kill_one(num_ranks - 1, 6 * step)
    Launch(study, run.name, *chain[-1]).finish()
    assert_same_curve(run, study / "runs" / "float32", FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "num_ranks"), [("fsdp", 2), ("latent", 4), ("deepspeed", 2)])
def test_the_same_ranks_continue_bit_for_bit(study, engine, num_ranks):
    whole, killed = (study / "runs" / f"{engine}-{name}" for name in ("whole", "killed"))
    Launch(study, whole.name, engine, num_ranks).finish()
    for step in (8, 20):
        Launch(study, killed.name, engine, num_ranks).kill_one(step % num_ranks, step)
    Launch(study, killed.name, engine, num_ranks).finish()
    assert lines_of(killed) == lines_of(whole)
    for file in ("crosscoder.safetensors", "config.json"):
        assert (killed / "crosscoder" / file).read_bytes() == (whole / "crosscoder" / file).read_bytes()


def torchrun(study, engine, num_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return subprocess.Popen(
        [*command, str(ROOT / "tests" / "train" / "launched.py"), str(study), engine],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_ends_the_run_which_the_same_command_continues(study):
    run = study / "runs" / "torchrun"
    launcher = torchrun(study, "fsdp", 2)
    while launcher.poll() is None and last_step(run) < 10:
        time.sleep(0.005)
    os.kill(children_of(launcher)[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and "Signal 9 (SIGKILL)" in errors
    assert not (run / "crosscoder").exists()
    launcher = torchrun(study, "latent", 3)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert_same_curve(run, study / "runs" / "float32", FLOAT32)
