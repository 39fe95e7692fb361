"""Exact selection of the largest scores of a whole batch (BatchTopK, arXiv 2412.06410).

The (B, L) matrix of scores is seen in pieces and need never exist whole; the result is that of a stable descending sort
of all of it, whatever the pieces, their order and the ranks they lie on. How the cut is found: `train.radix`. What is
kept on the way: `train.candidates` on a CPU, `train.slots` and `train.selection_kernels` on a GPU.

Shapes: B tokens, L latents, C latents of a piece, S selected.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from train.candidates import Candidates, Chunk, Entries, Growing
from train.radix import AllReduce
from train.slots import Slots
from train.usable import usable_kernels

PIECE_SIZE = 1 << 24  # scores that `select` looks at in one go


class Selection(NamedTuple):
    """The chosen entries of a (B, L) matrix, sorted by token, then latent: `token` (S,) and `latent` (S,), int64."""

    token: Tensor
    latent: Tensor


class Selected(NamedTuple):
    """A selection with its codes (S,) and scores (S,) = code * scale, in the wider dtype of the two.

    With fixed sizes S is the number asked for: free slots follow the chosen entries, with code and score 0 and the last
    token and latent that there are on this rank. `finite` is a bool tensor (): False when a score that was seen is nan
    or infinite, and the selection means nothing.
    """

    selection: Selection
    code_S: Tensor
    score_S: Tensor
    finite: Tensor


def select(scores_BL: Tensor, num_selected: int) -> Selection:
    """The `num_selected` largest positive scores, or all positive ones where there are fewer.

    Of equal scores at the cut those come first that have the smaller (token, latent). Equal to a stable descending sort
    of the flattened scores, cut after `num_selected`, without its entries <= 0.

    Raises FloatingPointError for scores that are not finite: a comparison would silently drop them.
    """
    num_tokens, num_latents = scores_BL.shape
    top = TopScores(num_selected, num_tokens, num_latents, scores_BL.device)
    one_L, rows = scores_BL.new_ones(num_latents), max(1, PIECE_SIZE // max(1, num_latents))
    for first in range(0, max(1, num_tokens), rows):
        top.add(scores_BL[first : first + rows], one_L, first_token=first)
    selected = top.finish()
    _require(selected.finite)
    positive_S = selected.score_S > 0
    return Selection(selected.selection.token[positive_S], selected.selection.latent[positive_S])


class TopScores:
    """The `num_selected` largest positive scores of a matrix that is given piece by piece.

    The order is total: score descending, then token, then latent. On a CPU the memory is that of a few times
    `num_selected` entries; on a GPU it grows with the largest piece as well, and no call waits for the device.

    Where ranks hold parts of the matrix, each counts its own rows and columns from 0, in `add` and in the result;
    `token_B` and `first_latent` tell where they lie in the whole matrix, by which ties are broken.
    """

    def __init__(
        self,
        num_selected: int,
        num_tokens: int,
        num_latents: int,
        device: torch.device,
        all_reduce: AllReduce | None = None,
        fixed_size: bool | None = None,
        token_B: Tensor | None = None,
        first_latent: int = 0,
    ):
        """`num_tokens` and `num_latents` are those of the whole matrix, of all ranks together.

        `all_reduce` sums a small int64 tensor over ranks in place; every rank calls it equally often. `fixed_size`
        tells whether shapes must not depend on values; by default they do on a CPU and do not elsewhere.

        `token_B` (int64, on the device) has the number of each of this rank's rows among those of the whole matrix:
        distinct, below `num_tokens`, in any order. None: row i has number i. `first_latent` is the number of this
        rank's first column. A rank without rows is one with an empty `token_B`.
        """
        self._num_latents, self._all_reduce = num_latents, all_reduce
        self._token_B = None if token_B is None else token_B.contiguous()
        self._first_latent, self._num_columns = first_latent, 0
        self._fixed_size = device.type != "cpu" if fixed_size is None else fixed_size
        self._sizes = num_selected, num_tokens, num_latents
        self._candidates: Candidates | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(self, pre_BC: Tensor, scale_C: Tensor, first_latent: int = 0, first_token: int = 0) -> None:
        """Scores `pre_BC * scale_C` of the tokens and latents from the two given on; `scale_C` is not negative.

        `pre_BC`, of any floating dtype, may be overwritten afterwards; negative codes are never chosen.
        """
        token_B = None if self._token_B is None else self._token_B[first_token : first_token + len(pre_BC)]
        chunk = Chunk(pre_BC, scale_C, first_token, self._first_latent + first_latent, token_B)
        self._num_columns = max(self._num_columns, first_latent + pre_BC.shape[1])
        if self._candidates is None:
            self._candidates = (_slots_for(chunk) if self._fixed_size else Growing)(*self._sizes)
        self._finite &= self._candidates.add(chunk)

    @torch.no_grad()
    def finish(self) -> Selected:
        """What was chosen of this rank's pieces.

        Raises FloatingPointError on a CPU, on all ranks, when a score was not finite; elsewhere `finite` says so.
        """
        assert self._candidates is not None, "Add a piece first, be it an empty one."
        entries = self._candidates.largest(self._all_reduce)
        finite = self._finite & entries.score.isfinite().all()
        if self._all_reduce is not None:
            num_bad_1 = (~finite).long()[None]
            self._all_reduce(num_bad_1)
            finite = num_bad_1[0] == 0
        if not self._fixed_size:
            _require(finite)
        return self._selected(entries, finite)

    def _selected(self, entries: Entries, finite: Tensor) -> Selected:
        """Entries, sorted by position in the whole matrix, by this rank's own rows and columns."""
        token_S, latent_S = entries.position // self._num_latents, entries.position % self._num_latents
        if self._num_columns < self._num_latents:  # free slots lie at the last position of the whole matrix
            latent_S = (latent_S - self._first_latent).clamp(max=self._num_columns - 1)
        if self._token_B is None:
            return Selected(Selection(token_S, latent_S), entries.code, entries.score, finite)
        row_S = _row_of(self._token_B, self._sizes[1])[token_S]
        row_S = torch.where(entries.score > 0, row_S, len(self._token_B) - 1)
        row_S, order_S = row_S.sort(stable=True)  # latents ascend within a token, and free slots stay the last
        return Selected(Selection(row_S, latent_S[order_S]), entries.code[order_S], entries.score[order_S], finite)


def _row_of(token_B: Tensor, num_tokens: int) -> Tensor:
    """The row (num_tokens,) that each token number has on this rank; 0 for those of other ranks."""
    return token_B.new_zeros(num_tokens).scatter_(0, token_B, torch.arange(len(token_B), device=token_B.device))


def _slots_for(chunk: Chunk) -> type[Candidates]:
    """The fastest form with fixed sizes that supports the device and the dtypes of a chunk."""
    narrow = chunk.score_dtype == torch.float32 and chunk.pre_BC.dtype in (torch.float32, torch.bfloat16)
    return _slots_on(chunk.pre_BC.device) if chunk.pre_BC.is_cuda and narrow else Slots


@cache
def _slots_on(device: torch.device) -> type[Candidates]:
    """The kernels, if they can be used; why not is said once."""
    kernels = usable_kernels(_selection_kernels, device, "Selection")
    return Slots if kernels is None else kernels.KernelSlots


def _selection_kernels() -> ModuleType:
    from train import selection_kernels

    return selection_kernels


def _require(finite: Tensor) -> None:
    if not finite:
        raise FloatingPointError("Scores are not finite: the activations or the weights hold nan or inf.")
