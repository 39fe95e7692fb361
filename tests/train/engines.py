"""Small engines, batches for them, and the comparison of two states."""

from __future__ import annotations

from copy import deepcopy

import torch
from planted import settings_of

from train.engine import Engine
from train.pieces import Piece, SavedState, TrainingState
from train.world import World


def engine_of(tmp_path, step="sparse", crosscoder=None, training=None, **changes):
    """An engine of one process; `changes` are of its settings for training."""
    settings = settings_of(tmp_path)
    settings.crosscoder = crosscoder or settings.crosscoder
    settings.training = training or settings.training
    settings.training.step = step
    for name, value in changes.items():
        setattr(settings.training, name, value)
    mean = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)) * 0.1
    world = World.alone(settings.training.device)
    return Engine(settings, ["base", "tuned"], 6, mean, torch.tensor([0.5, 0.8]), world)


def batches(count, num_tokens=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_tokens, 2, 6, generator=generator) * 2 for _ in range(count)]


def measured(data):
    """Batches as validation takes them, of one rank."""
    return [(x_BMD, None) for x_BMD in data]


def snapshot(engine):
    return deepcopy(engine.state())


def saved(engine):
    """The state of an engine of one process, to be loaded by another."""
    return SavedState.of([snapshot(engine)])


def silent_for(silent_tokens_L, threshold=None):
    """Saved counters of latents, of which none is known to be a candidate of AuxK."""
    pieces = {
        "silent_tokens": Piece.whole(silent_tokens_L),
        "auxk_candidates": Piece.whole(torch.zeros(len(silent_tokens_L), dtype=torch.uint8)),
    }
    values = {"threshold": threshold, "auxk_tokens": 0, "auxk_any": False}
    return SavedState.of([TrainingState(pieces, values)])


def assert_same_state(first, second):
    assert first.values == second.values
    assert first.tensors.keys() == second.tensors.keys()
    for name, piece in first.tensors.items():
        other = second.tensors[name]
        assert (piece.first, piece.num_rows) == (other.first, other.num_rows), name
        assert torch.equal(piece.rows, other.rows), name
