"""A killed run continues as if nothing had happened, on other ranks and with another engine, too.

Runs of all engines are compared with one that nothing interrupted. Those without DeepSpeed compute in float64, so that
rounding hides nothing; DeepSpeed does not, and is given the rounding of float32, which is too little to choose other
latents.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from launched import (
    NUM_STEPS,
    TIMEOUT_S,
    Launch,
    differences,
    last_step,
    lines_of,
    run_settings,
    saved_lines,
    wait_for,
)
from plain_step import WEIGHTS, PlainRun
from planted import random_store

from train.crosscoder import Crosscoder
from train.engine import Engine
from train.trainer import train

ROOT = Path(__file__).resolve().parents[2]
RANKS = {"single": [1], "fsdp": [2, 3, 4], "latent": [2, 3, 4], "deepspeed": [2, 3, 4]}
TRIALS = range(10)
# Between engines and numbers of ranks. In float32 a sum of some hundred terms is off by about 16 = sqrt(256) roundings
# of 2**-24, and so are what a step logs and by what it moves a weight: while the same latents are chosen, that adds up
# over the steps. float64 rounds by 2**-29 of this, and torch's fused Adam clips by the same float32 on all ranks.
FLOAT64, FLOAT32 = 1e-11, NUM_STEPS * 16 * 2**-24


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
def test_rounding_in_float32_is_too_little_to_choose_other_latents(study):
    """In all steps the best score left out is further below the last one chosen than the tolerance; for AuxK too."""
    settings, gaps, advance = run_settings(study, "single"), [], Engine.step

    def note_and_step(engine, x_BMD, *options):
        scaling = engine.crosscoder.activation_mean, engine.crosscoder.activation_scale
        plain = PlainRun(settings, {name: getattr(engine.crosscoder, name).detach() for name in WEIGHTS}, *scaling)
        score_BL = plain.encode(plain.scaled(x_BMD))[1]
        gaps.append(gap(score_BL.view(1, -1), plain.config.k * len(x_BMD)))
        gaps.append(gap(score_BL[:, engine._clocks.dead()], x_BMD.shape[2] // 2))
        return advance(engine, x_BMD, *options)

    with mock.patch.object(Engine, "step", note_and_step):
        train(settings, study / "runs" / "noted")
    assert len(gaps) == 2 * NUM_STEPS and min(gaps) > 2 * FLOAT32


def gap(score_RN, num_chosen):
    """How far below the last of the `num_chosen` largest of a row the next one is, as a share of it; of all rows the
    least. A score that is not positive is never chosen.
    """
    ranked_RN = score_RN.sort(dim=1, descending=True).values
    last_R, next_R = ranked_RN[:, num_chosen - 1 : num_chosen], ranked_RN[:, num_chosen : num_chosen + 1]
    return min((1 - next_R / last_R)[next_R > 0].tolist(), default=1.0)


def drawn(seed):
    """Three launches, each on another number of ranks than the one before: (engine, ranks); and random numbers."""
    choice, launches = random.Random(seed), []
    while len(launches) < 3:
        engine = choice.choice(list(RANKS))
        num_ranks = choice.choice(RANKS[engine])
        if not launches or num_ranks != launches[-1][1]:
            launches.append((engine, num_ranks))
    return launches, choice


def test_every_engine_is_killed_and_continues_others():
    trials = [[engine for engine, _ in drawn(seed)[0]] for seed in TRIALS]
    assert {before for *killed, _ in trials for before in killed} == set(RANKS)
    assert {after for _, *continued in trials for after in continued} == set(RANKS)
    assert 3 <= sum("deepspeed" in trial for trial in trials) <= 7


@pytest.mark.slow
@pytest.mark.parametrize("seed", TRIALS)
def test_one_rank_is_killed_at_a_random_step_and_others_continue(study, seed):
    assert_killed_and_continued(study, f"trial{seed}", *drawn(seed))


@pytest.mark.slow
def test_four_ranks_become_two_and_then_one(study):
    assert_killed_and_continued(study, "fewer", [("fsdp", 4), ("latent", 2), ("single", 1)], random.Random(0))


def assert_killed_and_continued(study, name, launches, choice):
    """Of the first two launches a rank is killed, and the third finishes what nothing seems to have interrupted."""
    first, second, last = launches
    in_float32 = "deepspeed" in (first[0], second[0], last[0])
    dtype, tolerance = (torch.float32, FLOAT32) if in_float32 else (torch.float64, FLOAT64)
    run, kept = study / "runs" / name, []
    for (engine, num_ranks), step in ((first, choice.randrange(1, 18)), (second, choice.randrange(18, NUM_STEPS - 8))):
        launch = Launch(study, run.name, engine, num_ranks, dtype)
        launch.kill_one(choice.randrange(num_ranks), max(step, last_step(run) + 1), choice.uniform(0.0, 0.03))
        assert saved_lines(run)[: len(kept)] == kept
        kept = saved_lines(run)
    Launch(study, run.name, *last, dtype).finish()
    assert saved_lines(run)[: len(kept)] == kept
    assert_same_curve(run, study / "runs" / ("float32" if in_float32 else "float64"), tolerance)


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
    wait_for(run, 10, lambda: launcher.poll() is None)
    os.kill(children_of(launcher)[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=TIMEOUT_S)
    assert launcher.returncode != 0 and "Signal 9 (SIGKILL)" in errors
    assert not (run / "crosscoder").exists()
    launcher = torchrun(study, "latent", 3)
    _, errors = launcher.communicate(timeout=TIMEOUT_S)
    assert launcher.returncode == 0, errors
    assert_same_curve(run, study / "runs" / "float32", FLOAT32)
