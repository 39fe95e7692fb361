"""Weights that ranks divide by rows: what is gathered, what is summed, what is kept, and what that takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import settings_of
from pool import pool_of

from extract.errors import BadInput
from train.config import EngineConfig
from train.engine import Engine
from train.fsdp import RowWeight, mesh_of
from train.world import World

SHAPES = [(13, 6), (8, 6), (3,), (13,)]


def whole_of(shape):
    """A weight with values that bf16 cannot hold, and whose small sums float32 holds exactly."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 2**-9


def divided(world, shape, dtype, ranks_per_copy):
    """(a divided weight with the values of `whole_of`, the copies of it)."""
    ranks, copies = world.split(ranks_per_copy)
    weight = RowWeight(whole_of(shape), mesh_of(ranks, copies, world.device), ranks, world.device, dtype)
    weight.rows.copy_(whole_of(shape)[weight.first : weight.first + len(weight.rows)])
    return weight, copies


def gathered(world, shape, dtype, ranks_per_copy):
    weight, _ = divided(world, shape, dtype, ranks_per_copy)
    found = []
    for _ in range(2):
        found.append(weight.gather().detach().clone())
        storage = weight.parameter.untyped_storage()
        weight.free()
        assert storage.size() == 0, "the whole weight is kept"
        weight.rows.add_(1.0)
    return found, weight.whole(), (weight.first, len(weight.rows))


@pytest.mark.parametrize(("num_ranks", "ranks_per_copy"), [(1, 1), (2, 2), (4, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_gathered_is_the_whole_as_the_rows_are_now(num_ranks, ranks_per_copy, dtype, shape):
    whole, rows = whole_of(shape), []
    for found, master, extent in pool_of(num_ranks).run(gathered, shape, dtype, ranks_per_copy):
        assert torch.equal(found[0], whole.to(dtype or torch.float32)) and torch.equal(
            found[1], (whole + 1).to(dtype or torch.float32)
        )
        assert torch.equal(master, whole + 2)
        rows.append(extent)
    for copy in range(0, num_ranks, ranks_per_copy):  # each copy has each row once
        extents = rows[copy : copy + ranks_per_copy]
        assert [first for first, _ in extents] == [sum(n for _, n in extents[:i]) for i in range(ranks_per_copy)]
        assert sum(length for _, length in extents) == shape[0]


def summed(world, shape, ranks_per_copy):
    weight, copies = divided(world, shape, torch.bfloat16, ranks_per_copy)
    weight.gather()
    weight.gradient.copy_(whole_of(shape) * (world.everyone.rank + 1))
    weight.free()
    return copies.sum(weight.gradient_rows(), "the test's sum"), weight.first


def places(world):
    """Whether exact operands and the crosscoder to be saved lie where the gradients do."""
    settings = settings_of(Path("unused"))
    settings.engine, settings.training.precision = EngineConfig(name="fsdp"), "bf16"
    placement = Engine(settings, ["base", "tuned"], 6, torch.zeros(2, 6), torch.ones(2), world)._placement
    memory = [gradient.data_ptr() for gradient in placement.gradients[:4]]
    with placement.whole(exact=True) as operands:
        read = [operands.W_enc, operands.b_enc, operands.W_dec, operands.b_dec]
    whole = placement.whole_crosscoder()
    saved = [] if whole is None else list(whole.parameters())
    return [[tensor.data_ptr() for tensor in tensors] == memory for tensors in (read, saved) if tensors]


def test_what_is_gathered_exactly_takes_no_memory_of_its_own():
    assert pool_of(2).run(places) == [[True, True], [True]]


@pytest.mark.parametrize(("num_ranks", "ranks_per_copy"), [(1, 1), (2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_summed_in_float32_whatever_is_gathered(num_ranks, ranks_per_copy, shape):
    """1 + 2 + ... + R times values that bf16 cannot hold."""
    expected = whole_of(shape) * (num_ranks * (num_ranks + 1) / 2)
    for rows, first in pool_of(num_ranks).run(summed, shape, ranks_per_copy):
        assert torch.equal(rows, expected[first : first + len(rows)])


def operands_of(world, engine_name, precision, ranks_per_copy, dedicated):
    """What products read after the first weights are drawn, narrow and exact, and the crosscoder to be saved."""
    settings = settings_of(Path("unused"))
    settings.engine = EngineConfig(name=engine_name, ranks_per_copy=ranks_per_copy)
    settings.crosscoder.num_latents, settings.crosscoder.dedicated = 50, dedicated
    settings.training.precision = precision
    mean_MD, scale_M = torch.full((2, 6), 0.1), torch.tensor([0.5, 0.8])
    engine = Engine(settings, ["base", "tuned"], 6, mean_MD, scale_M, world)
    everyone, x_BMD = world.everyone, torch.randn(32, 2, 6, generator=torch.Generator().manual_seed(0))
    token_b = torch.arange(everyone.rank, 32, everyone.size)
    engine.initialise(x_BMD[token_b], token_b if everyone.size > 1 else None)
    found = []
    for exact in (False, True):
        with engine._placement.whole(exact) as operands:
            found.append({name: tensor.detach().clone() for name, tensor in vars(operands).items()})
    whole = engine._placement.whole_crosscoder()
    return found, None if whole is None else dict(whole.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_copy"), [(1, None), (2, None), (4, None), (4, 2)])
def test_products_read_the_bits_that_one_process_reads(num_ranks, ranks_per_copy, precision):
    """Decoder norms and biases too, so that nothing but the rounding of products can change a selection."""
    expected, crosscoder = operands_of(World.alone(), "single", precision, None, 0.125)
    ranks = pool_of(num_ranks).run(operands_of, "fsdp", precision, ranks_per_copy, 0.125)
    for found, _ in ranks:
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(ours[name].dtype == theirs[name].dtype for name in ours)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    wholes = [whole for _, whole in ranks]
    assert wholes[1:] == [None] * (num_ranks - 1)
    assert all(torch.equal(wholes[0][name], crosscoder[name]) for name in crosscoder)


def test_ranks_per_copy_must_divide_the_ranks():
    with pytest.raises(BadInput, match="engine.ranks_per_copy=3 does not divide the 4 ranks"):
        pool_of(4).run(operands_of, "fsdp", "fp32", 3, 0.0)
