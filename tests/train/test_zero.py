"""Training steps on weights that DeepSpeed divides, against the same steps of one process in float64."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from planted import settings_of
from pool import pool_of

from benchmarks.traffic import RingTraffic
from extract.errors import BadInput
from train.batch_topk import Selection
from train.initialisation import initialise
from train.pieces import Piece, SavedState, TrainingState
from train.placement import Space
from train.sparse import Codes, reconstruct
from train.zero import ZeroWeights
from train.zero_library import deepspeed_on

L, M, D, B = 37, 2, 6, 24  # ranks divide neither the rows nor the numbers of a weight
N = 2 * L * M * D + L + M * D
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
MAX_NORM, RATE = 9.0, 1e-2  # some gradients are clipped, some are not
SPACE = Space(["base", "tuned"], D, "block1", torch.full((M, D), 0.5), torch.tensor([0.5, 2.0]))


@dataclass(frozen=True)
class Case:
    stage: int
    offload_optimizer: bool = False
    form: str = "sparse"
    num_micro_steps: int = 1
    json: str | None = None

    def settings(self):
        settings = settings_of(Path("unused"))
        settings.crosscoder = replace(settings.crosscoder, num_latents=L, dedicated=0.125)
        settings.training = replace(settings.training, step=self.form, max_grad_norm=MAX_NORM)
        settings.engine = replace(
            settings.engine,
            name="deepspeed",
            zero_stage=self.stage,
            offload_optimizer=self.offload_optimizer,
            deepspeed_json=self.json,
        )
        return settings


CASES = [
    Case(stage, offload, form, 3 if (form == "sparse") == offload else 1)
    for stage, offload, form in itertools.product((1, 2, 3), (False, True), ("readable", "sparse"))
]


def batches(count):
    """Scaled batches (B, M, D), each with a mask (B, L) of the codes that are kept."""
    random = torch.Generator().manual_seed(0)
    for _ in range(count):
        x_BMD = torch.randn(B, M, D, generator=random, dtype=torch.float32)
        yield x_BMD, torch.rand(B, L, generator=random, dtype=torch.float32) < 0.2


def reconstruction(crosscoder, x_BW, mask_BL):
    acts_BL = torch.addmm(crosscoder.b_enc, x_BW, crosscoder.W_enc.T).relu() * mask_BL
    return acts_BL, acts_BL @ crosscoder.W_dec + crosscoder.b_dec


def loss_of(placement, operands, x_bMD, mask_bL, form, accumulate):
    """This rank's share of the mean squared error of some tokens."""
    x_bW, crosscoder = x_bMD.flatten(1), placement.crosscoder
    if form == "readable":
        _, recons_bW = reconstruction(crosscoder, x_bW, mask_bL)
    else:
        acts_bL = reconstruction(crosscoder, x_bW, mask_bL)[0].detach()
        selection = Selection(*acts_bL.nonzero(as_tuple=True))
        codes = Codes(selection, acts_bL[tuple(selection)], torch.zeros(0, dtype=torch.int64), acts_bL[:, :0])
        gradients = placement.gradients._replace(accumulate=accumulate)
        recons_bW, _ = reconstruct(crosscoder, x_bW, codes, operands, gradients)
    return (recons_bW - x_bW).square().sum() / B


def gradient_norm(world, placement, case, x_BMD, mask_BL):
    """One step without its update; ranks take turns with tokens."""
    rank, size = world.everyone.rank, world.everyone.size
    with placement.whole() as operands:
        for number, part in enumerate(torch.arange(rank, B, size).chunk(case.num_micro_steps)):
            loss = loss_of(placement, operands, x_BMD[part], mask_BL[part], case.form, number > 0)
            placement.backward(loss)
    return placement.reduce()


def started(world, case):
    placement = ZeroWeights(case.settings(), SPACE, world)
    placement.initialise(next(batches(1))[0], seed=3)
    return placement


def trained(world, case, num_steps=4):
    """(gradient norms, this rank's pieces, tensors of the whole crosscoder or None)"""
    placement, norms = started(world, case), []
    for number, (x_BMD, mask_BL) in enumerate(batches(num_steps), 1):
        norm = gradient_norm(world, placement, case, x_BMD, mask_BL)
        placement.update(number, RATE, norm, torch.tensor(False))
        norms.append(norm.item())
    whole = placement.whole_crosscoder()
    return norms, placement.pieces(), whole and whole.state_dict()


def expected(num_steps=4):
    """(gradient norms, tensors by name) of one process: dense, in float64, with Adam as arXiv 1412.6980 writes it."""
    crosscoder = SPACE.crosscoder(Case(1).settings().crosscoder, torch.device("cpu"))
    initialise(crosscoder, next(batches(1))[0], 3)
    crosscoder, norms = crosscoder.double(), []
    weights = dict(crosscoder.named_parameters())
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    for number, (x_BMD, mask_BL) in enumerate(batches(num_steps), 1):
        x_BW = x_BMD.double().flatten(1)
        crosscoder.zero_grad()
        ((reconstruction(crosscoder, x_BW, mask_BL)[1] - x_BW).square().sum() / B).backward()
        foreign_LM = crosscoder.foreign_rows()
        for name in ("W_enc", "W_dec"):
            weights[name].grad.view(L, M, D)[foreign_LM] = 0.0
        norms.append(math.sqrt(sum(weight.grad.square().sum().item() for weight in weights.values())))
        for name, weight in weights.items():
            gradient = weight.grad * min(1.0, MAX_NORM / norms[-1])
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            size = (first[name] / (1 - 0.9**number)) / ((second[name] / (1 - 0.999**number)).sqrt() + 1e-8)
            weight.data -= RATE * size
    moments = {"exp_avg": first, "exp_avg_sq": second}
    tensors = {f"crosscoder.{name}": weight.detach() for name, weight in weights.items()}
    return norms, tensors | {f"adam.{name}.{key}": value[name] for key, value in moments.items() for name in weights}


def together(pieces_of_ranks):
    """Whole tensors by name. Fails where ranks hold a row twice, or none does."""
    saved = SavedState.of(TrainingState(pieces, {}) for pieces in pieces_of_ranks)
    return {name: saved.rows(name) for name in saved.names}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_those_of_one_process(num_ranks, case):
    norms, tensors = expected()
    assert min(norms) < MAX_NORM < max(norms)
    results = pool_of(num_ranks).run(trained, case)
    assert all(result[0] == results[0][0] for result in results)
    assert results[0][0] == pytest.approx(norms, rel=2e-6)
    found = together(pieces for _, pieces, _ in results)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6 * tensor.abs().max().item())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_whole_crosscoder_is_on_the_first_rank(stage):
    (_, own, whole), (_, others, nothing) = pool_of(2).run(trained, Case(stage), 1)
    assert nothing is None
    found = together([own, others])
    assert all(torch.equal(whole[name], found[f"crosscoder.{name}"]) for name in WEIGHTS)
    assert torch.equal(whole["activation_mean"], SPACE.activation_mean)
    assert torch.equal(whole["activation_scale"], SPACE.activation_scale)


@pytest.mark.parametrize("stage", [1, 3])
def test_first_weights_are_those_of_one_process(stage):
    crosscoder = SPACE.crosscoder(Case(1).settings().crosscoder, torch.device("cpu"))
    initialise(crosscoder, next(batches(1))[0], 3)
    found = together(pieces for _, pieces, _ in pool_of(2).run(trained, Case(stage), 0))
    assert all(torch.equal(found[f"crosscoder.{name}"], crosscoder.get_parameter(name)) for name in WEIGHTS)
    assert all(not found[name].any() for name in found if name.startswith("adam."))


def stepped_over(world, case):
    """[pieces] after a step, after a bad one, after one that is skipped, after a good one."""
    placement, seen = started(world, case), []
    (first, second), last = itertools.tee(batches(2)), world.everyone.size - 1
    (x_BMD, mask_BL), (y_BMD, _) = list(first)
    del second
    bad_BMD = y_BMD.clone()
    bad_BMD[last] = math.inf
    for batch_BMD, skip in ((x_BMD, False), (bad_BMD, None), (y_BMD, True), (y_BMD, False)):
        norm = gradient_norm(world, placement, case, batch_BMD, mask_BL)
        assert norm.isfinite() == (skip is not None)
        placement.update(2 if seen else 1, RATE, norm, ~norm.isfinite() if skip is None else torch.tensor(skip))
        seen.append(placement.pieces())
    return seen


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_a_step_that_is_not_finite_changes_nothing(stage, offload):
    states = [together(pieces) for pieces in zip(*pool_of(2).run(stepped_over, Case(stage, offload)), strict=True)]
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor) and torch.equal(states[2][name], tensor), name
        assert not torch.equal(states[3][name], tensor), name


def continued(world, case, tensors):
    """This rank's pieces of a state as they are loaded, and after one more step; all tensors of the state are whole."""
    placement = ZeroWeights(case.settings(), SPACE, world)
    placement.load(SavedState.of([TrainingState({name: Piece.whole(tensor) for name, tensor in tensors.items()}, {})]))
    loaded = placement.pieces()
    norm = gradient_norm(world, placement, case, *next(batches(1)))
    placement.update(5, RATE, norm, torch.tensor(False))
    return loaded, placement.pieces()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True), (3, False), (3, True)])
def test_a_state_is_continued_by_any_stage_on_any_ranks(ranks, stage, offload):
    saved = together(pieces for _, pieces, _ in pool_of(2).run(trained, Case(2)))
    loaded, after = (
        together(pieces) for pieces in zip(*pool_of(ranks).run(continued, Case(stage, offload), saved), strict=True)
    )
    reference = together(pieces for _, pieces in pool_of(1).run(continued, Case(2), saved))
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
        torch.testing.assert_close(after[name], reference[name], rtol=1e-5, atol=1e-6 * tensor.abs().max().item())


def sent(world, case):
    """Bytes sent by a step, and the numbers of W_enc that this rank has after, within and before it."""
    placement = started(world, case)
    x_BMD, mask_BL = next(batches(1))
    with RingTraffic() as traffic:
        norm = gradient_norm(world, placement, case, x_BMD, mask_BL)
        placement.update(1, RATE, norm, torch.tensor(False))
    outside = placement.crosscoder.W_enc.numel()
    with placement.whole():
        return traffic.sent, outside, placement.crosscoder.W_enc.numel()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_sums_gradients_once_and_gathers_weights_once(stage):
    """Of R = 2 ranks each sends (R - 1) / R of 4 N bytes, twice; counters and norms are a few numbers."""
    for bytes_sent, outside, within in pool_of(2).run(sent, Case(stage, num_micro_steps=3)):
        assert bytes_sent["gather"] == pytest.approx(2 * N, rel=0.02)
        assert bytes_sent["reduce-scatter" if stage == 3 else "reduce"] == pytest.approx(2 * N, rel=0.02)
        assert bytes_sent["all-reduce"] <= 64
        assert outside == (0 if stage == 3 else L * M * D) and within == L * M * D


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_users_file_changes_how_and_not_what(tmp_path, stage):
    path = tmp_path / "user.json"
    zero = {"reduce_bucket_size": 100, "overlap_comm": True, "reduce_scatter": False}
    reports = {"steps_per_print": 1, "memory_breakdown": True, "dump_state": True, "comms_logger": {"enabled": True}}
    path.write_text(json.dumps({**reports, "zero_optimization": zero}))
    norms, tensors = expected()
    results = pool_of(2).run(trained, Case(stage, json=str(path)))
    assert results[0][0] == pytest.approx(norms, rel=2e-6)
    found = together(pieces for _, pieces, _ in results)
    torch.testing.assert_close(found["crosscoder.W_dec"].double(), tensors["crosscoder.W_dec"], rtol=1e-5, atol=1e-6)


def held_after(world, case):
    """What the operands of a step hold after it, and bytes of summed parts then and after the update."""
    placement = started(world, case)
    x_BMD, mask_BL = next(batches(1))
    with placement.whole() as operands:
        placement.backward(loss_of(placement, operands, x_BMD, mask_BL, case.form, False))
    parts, norm = placement._engine.optimizer.grad_partitions_flat_buffer, placement.reduce()
    summed = parts.untyped_storage().nbytes()
    placement.update(1, RATE, norm, torch.tensor(False))
    return vars(operands), summed, parts.untyped_storage().nbytes()


def test_stage_3_holds_whole_weights_and_summed_gradients_only_while_they_are_used():
    for operands, summed, left in pool_of(2).run(held_after, Case(3)):
        assert operands == {} and summed == pytest.approx(4 * N / 2, rel=0.02) and left == 0


TWICE = """
import logging, random, signal
import torch
from train.config import EngineConfig
from train.world import World
import test_zero

before = [signal.getsignal(number) for number in sorted(signal.valid_signals())], random.getstate()
for stage in (2, 3):
    with World.open(EngineConfig(name="deepspeed"), "cpu") as world:
        torch.manual_seed(1)
        test_zero.trained(world, test_zero.Case(stage, form="readable"), 1)
        assert torch.equal(torch.rand(9), torch.rand(9, generator=torch.Generator().manual_seed(1)))
assert before == ([signal.getsignal(number) for number in sorted(signal.valid_signals())], random.getstate())
assert not logging.getLogger().handlers
"""


def test_runs_in_one_process_are_silent_and_leave_it_as_it_was():
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    run = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, env={"PYTHONPATH": ":".join(folders), "PATH": ""}
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_without_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(BadInput, match=r"pip install 'crossdiff\[deepspeed\]'"):
        deepspeed_on(torch.device("cpu"))


def test_a_deepspeed_that_is_too_old(monkeypatch):
    import deepspeed

    monkeypatch.delattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction")
    with pytest.raises(BadInput, match=r"too old: pip install -U 'crossdiff\[deepspeed\]'"):
        deepspeed_on(torch.device("cpu"))
