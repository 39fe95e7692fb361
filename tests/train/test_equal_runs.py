"""What the ranks of every engine must agree on besides steps: validation, a step that is not finite, saved weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from equal import NUM_TOKENS, batches, copied, engine_of, part
from equal_cases import MATRIX, OTHERS, TWO_COPIES
from pool import pool_of

from extract.metrics_file import Histogram
from train.crosscoder import Crosscoder
from train.pieces import SavedState

pytestmark = pytest.mark.slow
CASES = [*[case for case in MATRIX if case.step == "sparse"], *TWO_COPIES, *OTHERS]
EARLY = {"threshold_start_step": 2}
# Held-out tokens: two batches and one of three tokens, of which some ranks have none.
NUM_HELDOUT = 2 * NUM_TOKENS + 3


def train(world, case, num_steps):
    engine, data = engine_of(world, case), batches(case)
    engine.initialise(*part(data[0], world.everyone))
    for batch in data[:num_steps]:
        x_bMD, token_b = part(batch, world.everyone)
        engine.step(x_bMD, token_b=token_b)
    return engine


def heldout(case, group):
    """What the ranks of `group` read of the held-out batches: every size-th token."""
    x_NMD = torch.cat([x_BMD for x_BMD, _ in batches(case)[-3:]])[:NUM_HELDOUT]
    number_B = torch.arange(NUM_TOKENS)
    for first in range(0, NUM_HELDOUT, NUM_TOKENS):
        x_BMD = x_NMD[first : first + NUM_TOKENS]
        yield x_BMD[group.rank :: group.size], number_B[: len(x_BMD)][group.rank :: group.size]


def validated(world, case):
    """Validation metrics without and with a threshold, and whether they left the state as it was."""
    found = []
    for num_steps in (1, 6):
        engine = train(world, case, num_steps)
        before = copied(engine.state())
        found.append(engine.evaluate(heldout(case, engine.share.tokens)))
        after = engine.state()
        unchanged = all(torch.equal(piece.rows, after.tensors[name].rows) for name, piece in before.tensors.items())
        found.append({"unchanged": unchanged and before.values == after.values})
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_validation_is_the_same(case):
    case = replace(case, crosscoder={**case.crosscoder, **EARLY})
    expected = pool_of(1).run(validated, case.reference())[0]
    assert expected[0]["val/l0"] == pytest.approx(3, abs=0.1)
    found = pool_of(case.num_ranks).run(validated, case)
    assert all(rank == found[0] for rank in found)
    for metrics, wanted in zip(found[0], expected, strict=True):
        check_metrics(metrics, wanted)


def check_metrics(found, wanted):
    """Equal but for rounding, which may bring one latent into the next bin of a histogram."""
    numbers = {name: value for name, value in wanted.items() if not isinstance(value, Histogram)}
    assert found.keys() == wanted.keys() and {name: found[name] for name in numbers} == pytest.approx(
        numbers, rel=1e-4, abs=1e-4
    )
    for name in wanted.keys() - numbers.keys():
        assert found[name].edges == wanted[name].edges and sum(found[name].counts) == sum(wanted[name].counts)
        assert sum(abs(a - b) for a, b in zip(found[name].counts, wanted[name].counts, strict=True)) <= 2


def met_a_bad_batch(world, case, bad):
    """(step, whether the state stayed) that the engine tells after a batch of which one rank has a bad token."""
    engine = train(world, case, 3)
    before = copied(engine.state())
    x_bMD, token_b = part(batches(case)[3], world.everyone)
    if world.everyone.rank == world.everyone.size - 1:
        x_bMD[1, 1, 2] = bad
    try:
        engine.step(x_bMD, token_b=token_b)
    except FloatingPointError:
        after = engine.state()
        same = all(torch.equal(piece.rows, after.tensors[name].rows) for name, piece in before.tensors.items())
        return engine.steps_done, same and before.values == after.values
    return None


@pytest.mark.parametrize("bad", [math.nan, 1e30], ids=["score", "loss"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_stop_before_the_update_where_one_has_a_bad_token(case, bad):
    """nan makes scores bad; 1e30 is a score, but its squared error is none."""
    found = pool_of(case.num_ranks).run(met_a_bad_batch, case, bad)
    assert found == [(3, True)] * case.num_ranks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_crosscoder_is_saved_whole(case, tmp_path):
    states = pool_of(case.num_ranks).run(state_and_save, case, tmp_path / "crosscoder")
    crosscoder, whole = Crosscoder.load(tmp_path / "crosscoder"), SavedState.of(states)
    for name, weight in crosscoder.named_parameters():
        assert torch.equal(weight.detach(), whole.rows(f"crosscoder.{name}")), name
    assert crosscoder.trained_with == {"why": "a test"}


def state_and_save(world, case, folder):
    engine = train(world, case, 4)
    engine.save_crosscoder(folder, {"why": "a test"})
    return copied(engine.state())
