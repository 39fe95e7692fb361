"""The largest scores of each token where ranks divide the latents: exact, by counts alone.

A rank sorts the largest of its own scores, so that it tells at once how many reach a bound. For each token the ranks
add up these counts for 15 bounds, which leaves a sixteenth of where the cut may lie, and then for 15 bounds in there.
Ties at the cut go to the first ranks, and there to the first columns.

Sent for each token, where scores are fp32: 15 counts for every four of their 31 bits, 7 for the last three, and two
numbers, 456 bytes. To gather the scores themselves would take 4 bytes for each that may be chosen: more from 115 on,
and AuxK chooses half the width of a model, 7 kB for a width of 3584. No step asks the device for a value.

Shapes: B tokens, Z columns of this rank (another number on every rank, maybe 0), K of them sorted, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.radix import key_bits, score_keys
from train.ranks import Group

BITS = 4  # of the cut, found by one sum over ranks


@torch.no_grad()
def row_cut(score_BZ: Tensor, num_chosen: int, group: Group) -> Tensor:
    """Mask (B, Z) of the `num_chosen` largest positive scores of each row, over the columns of all ranks of a group.

    Of equal scores at the cut those of the smaller rank come first, then those of the smaller column. All positive ones
    are chosen where there are fewer. Alone, a rank leaves equal scores to torch.topk.
    """
    num_kept = min(num_chosen, score_BZ.shape[1])
    if group.size == 1:
        kept_BK = score_BZ.topk(num_kept, dim=1, sorted=False).indices
        return torch.zeros_like(score_BZ, dtype=torch.bool).scatter_(1, kept_BK, True) & (score_BZ > 0)
    cut_B1 = _cut(score_BZ.topk(num_kept, dim=1).values, num_chosen, group)
    is_equal_BZ = (score_BZ == cut_B1) & (cut_B1 > 0)
    is_above_BZ = score_BZ > cut_B1
    num_equal_B1 = _equal_here(is_above_BZ, is_equal_BZ, num_chosen, group)
    return is_above_BZ | (is_equal_BZ & (is_equal_BZ.cumsum(1, dtype=torch.int32) <= num_equal_B1))


def _cut(descending_BK: Tensor, num_chosen: int, group: Group) -> Tensor:
    """The `num_chosen`-th largest score (B, 1) over all ranks, 0 where fewer are positive.

    A rank's K largest tell enough: where it has more than K at least as large as a bound, K alone are `num_chosen`.
    """
    key_BK = score_keys(descending_BK).flip(1).contiguous()
    found_B1 = key_BK.new_zeros(len(key_BK), 1)
    for end in range(key_bits(key_BK), 0, -BITS):
        shift = max(0, end - BITS)
        digits = torch.arange(1, 1 << (end - shift), dtype=key_BK.dtype, device=key_BK.device)
        at_least_BN = _num_at_least(key_BK, found_B1 + (digits << shift))
        group.sum(at_least_BN, "counts of AuxK's scores")
        digit_B1 = (at_least_BN >= num_chosen).sum(1, keepdim=True)
        found_B1 = found_B1 + (digit_B1 << shift).to(key_BK.dtype)
    return found_B1.view(descending_BK.dtype)


def _num_at_least(ascending_BK: Tensor, bound_BN: Tensor) -> Tensor:
    """How many entries of each row reach each bound, (B, N) int32."""
    if ascending_BK.shape[1] == 0:
        return torch.zeros_like(bound_BN, dtype=torch.int32)
    return ascending_BK.shape[1] - torch.searchsorted(ascending_BK, bound_BN, out_int32=True)


def _equal_here(is_above_BZ: Tensor, is_equal_BZ: Tensor, num_chosen: int, group: Group) -> Tensor:
    """How many of a row's scores that equal the cut are this rank's to choose, (B, 1): what others leave."""
    here_12B = torch.stack([is_above_BZ.sum(1), is_equal_BZ.sum(1)])[None].int()
    above_RB, equal_RB = group.gather(here_12B, "ties of AuxK's scores").unbind(1)
    return (num_chosen - above_RB.sum(0) - equal_RB[: group.rank].sum(0))[:, None]
