"""Training states whose every number tells its step, tensor, row and column, cut in rows over any number of ranks."""

from __future__ import annotations

import torch

from train.checkpoint import Checkpoints
from train.pieces import Piece, TrainingState

# Rows and columns, and the dtype. "few" has fewer rows than some worlds have ranks.
TENSORS = {
    "weights": ((11, 3), torch.float32),
    "adam.weights.exp_avg": ((11, 3), torch.float64),
    "few": ((2, 4), torch.bfloat16),
    "owner": ((7, 1), torch.int8),
    "silent_tokens": ((5, 1), torch.int64),
}
FROM_THE_LAST_RANK = {"one_number": torch.tensor([0.1])}


def planted(name, steps):
    """The whole tensor after `steps` steps: in row i and column j, i + j / 4 + steps, exact in every dtype here."""
    (num_rows, num_columns), dtype = TENSORS[name]
    value = torch.arange(num_rows)[:, None] + torch.arange(num_columns) / 4 + steps
    return value.to(dtype)


def cuts(num_rows, num_ranks):
    """First rows of the ranks, unevenly: rank r begins at r^2 / num_ranks^2 of all."""
    return [num_rows * rank**2 // num_ranks**2 for rank in range(num_ranks + 1)]


def state_of(rank, num_ranks, steps):
    """Every tensor divided in rows, but for the counters, which rank 0 gives, and a number, which the last one does."""
    pieces = {}
    for name in TENSORS:
        whole = planted(name, steps)
        first, stop = cuts(len(whole), num_ranks)[rank : rank + 2]
        pieces[name] = Piece(whole[first:stop].clone(), first, len(whole))
    if num_ranks > 1:
        counters = planted("silent_tokens", steps)
        pieces["silent_tokens"] = Piece(counters if rank == 0 else counters[:0], 0, len(counters))
    if rank == num_ranks - 1:
        pieces |= {name: Piece.whole(tensor.clone()) for name, tensor in FROM_THE_LAST_RANK.items()}
    return TrainingState(pieces, {"steps_done": steps, "threshold": 0.1 + 0.2 * steps})


def checkpoints_of(folder, world, keep=2, keep_every=0, **identity):
    return Checkpoints(
        folder / "checkpoints", keep, {"crosscoder.k": 3, "data": ["a", "b"], **identity}, world, keep_every
    )


def save_all(world, folder, steps, **settings):
    """Checkpoints after each of `steps`."""
    checkpoints = checkpoints_of(folder, world, **settings)
    for number in steps:
        checkpoints.save(state_of(world.everyone.rank, world.everyone.size, number))
    checkpoints.close()


def assert_holds(saved, steps):
    """`saved` is the state after `steps` steps, to the bit."""
    assert saved.values == {"steps_done": steps, "threshold": 0.1 + 0.2 * steps}
    assert saved.names == sorted([*TENSORS, *FROM_THE_LAST_RANK])
    for name in TENSORS:
        expected = planted(name, steps)
        found = saved.rows(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert torch.equal(saved.rows("one_number"), FROM_THE_LAST_RANK["one_number"])


def loaded_step(world, folder, **settings):
    """Steps done in the newest intact checkpoint, which holds what was planted; None where there is none."""
    saved = checkpoints_of(folder, world, **settings).load()
    if saved is None:
        return None
    assert_holds(saved, saved.values["steps_done"])
    return saved.values["steps_done"]


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
