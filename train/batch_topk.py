"""Exact selection of the largest scores of a whole batch (BatchTopK, arXiv 2412.06410).

Ranking millions of scores to keep half a percent of them is slow. A bound guessed from a sample leaves few candidates,
and the exact choice is made among these; a bound that proves too high is lowered, so the sample decides only how long
it takes.

Shapes: B tokens, L latents, S selected, C candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE_SIZE = 1 << 16
MAX_ELEMENTS = 1 << 30  # torch.topk and, on GPUs, torch.nonzero fail beyond 2^31 - 1 elements


class Selection(NamedTuple):
    """The chosen entries of a (B, L) matrix, sorted by token, then latent: `token` (S,) and `latent` (S,), int64."""

    token: Tensor
    latent: Tensor


def select(scores_BL: Tensor, num_selected: int) -> Selection:
    """The `num_selected` largest positive scores, or all positive ones where there are fewer.

    Of equal scores at the cut those come first that have the smaller (token, latent). Equal to a stable descending sort
    of the flattened scores, cut after `num_selected`, without its entries <= 0.

    Raises FloatingPointError for scores that are not finite: a comparison would silently drop them.
    """
    _require_finite(scores_BL)
    if num_selected <= 0 or scores_BL.numel() == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=scores_BL.device)
        return Selection(nothing, nothing.clone())
    candidate_C, score_C = _candidates(scores_BL, num_selected)
    if len(candidate_C) > num_selected:
        candidate_C = candidate_C[_among_largest(score_C, num_selected)]
    num_latents = scores_BL.shape[1]
    return Selection(candidate_C // num_latents, candidate_C % num_latents)


def _require_finite(scores_BL: Tensor) -> None:
    """A sum is one quick pass; only when it is not finite can a single score be, and each is looked at."""
    if not scores_BL.sum().isfinite() and not scores_BL.isfinite().all():
        raise FloatingPointError("Scores are not finite: the activations or the weights hold nan or inf.")


def _candidates(scores_BL: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """Flat positions, ascending, and values of positive scores: at least the `num_selected` largest, or all."""
    sample = _sample(scores_BL)
    expected = len(sample) * num_selected / scores_BL.numel()
    rank = math.ceil(
        expected + 4 * math.sqrt(expected) + 8
    )  # four standard deviations of the count that a sample would see
    while True:
        bound = _kth_largest(sample, rank).clamp(min=0) if rank < len(sample) else sample.new_zeros(())
        position_C, score_C = _above(scores_BL, bound)
        if len(position_C) >= num_selected or bound == 0:
            return position_C, score_C
        rank *= 4


def _sample(scores_BL: Tensor) -> Tensor:
    """About SAMPLE_SIZE scores at an even stride that shares no factor with L, so that all latents are seen."""
    stride = max(1, scores_BL.numel() // SAMPLE_SIZE)
    while math.gcd(stride, scores_BL.shape[1]) > 1:
        stride += 1
    return scores_BL.flatten()[::stride]


def _above(scores_BL: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions and values of scores > bound, in blocks of at most MAX_ELEMENTS."""
    flat = scores_BL.flatten()
    blocks = flat.split(MAX_ELEMENTS)
    found = [(block > bound).nonzero().squeeze(1) for block in blocks]
    position_C = torch.cat([position + number * MAX_ELEMENTS for number, position in enumerate(found)])
    return position_C, flat[position_C]


def _among_largest(score_C: Tensor, num_selected: int) -> Tensor:
    """Mask (C,) of exactly `num_selected` entries: all above the cut and, of those equal to it, the first."""
    cut = _kth_largest(score_C, num_selected)
    above_C, equal_C = score_C > cut, score_C == cut
    return above_C | (equal_C & (equal_C.cumsum(0) <= num_selected - above_C.sum()))


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest value, counted from 1. Beyond MAX_ELEMENTS, blocks are first thinned to their k largest, as long
    as k, below half of a block, makes them shrink.
    """
    while len(values) > MAX_ELEMENTS and k < MAX_ELEMENTS // 2:
        values = torch.cat(
            [block.topk(min(k, len(block)), sorted=False).values for block in values.split(MAX_ELEMENTS)]
        )
    return values.topk(k, sorted=False).values.min()
