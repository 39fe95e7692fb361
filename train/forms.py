"""What a step needs of a crosscoder's codes, in two forms: the readable reference and the fast one.

Shapes: B tokens of the batch, rows of a micro-batch as R * m (`train.micro_batches`), W = M * D, L latents of this
rank, S selected codes, Z latents that may be dead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from train.batch_topk import Selected, Selection
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.micro_batches import MicroBatches
from train.placement import Share
from train.products import Gradients
from train.readable import dense_auxk, dense_codes, dense_reconstruction, largest
from train.row_cut import row_cut
from train.sparse import Codes, add_scores, auxk_codes, reconstruct, top_scores


@dataclass(frozen=True)
class Task:
    """What one step works on."""

    crosscoder: Crosscoder
    operands: Operands
    share: Share
    batches: MicroBatches
    # Codes that survive in the batch, k * B.
    num_selected: int
    # Dead latents of this rank (L,); whether there are any on any rank, on the device; latents (Z,) among which are all
    # dead ones of this rank, None on all ranks where it is known that no rank has one.
    dead_L: Tensor
    any_dead: Tensor
    candidate_Z: Tensor | None
    # Whether shapes must not depend on values, as on a GPU.
    fixed_size: bool

    @property
    def config(self) -> CrosscoderConfig:
        return self.crosscoder.config

    @property
    def with_bias(self) -> bool:
        """Of the ranks that decode the same tokens the first adds the decoder bias."""
        return self.share.latents.rank == 0

    def choose(self, score_BZ: Tensor) -> Tensor:
        """Mask of AuxK's latents for each token, the D // 2 largest scores among the dead latents of all ranks."""
        return row_cut(score_BZ, self.crosscoder.d_model // 2, self.share.latents)


class Form(Protocol):
    """One way to compute what a step needs; both are equal to rounding."""

    def select(self) -> Selected:
        """What is kept of this rank's codes of all micro-batches."""
        ...

    def reconstruct(self, number: int, with_auxk: bool) -> tuple[Tensor, Tensor | None]:
        """(recons, e_hat), both (R * m, W), of a micro-batch from this rank's latents; e_hat None without AuxK."""
        ...


class SparseForm:
    """The fast one: `train.sparse`."""

    def __init__(self, task: Task, gradients: Gradients | None):
        self._task, self._gradients = task, gradients
        self._codes: list[tuple[Selection, Tensor]] = []

    def select(self) -> Selected:
        task, batches = self._task, self._task.batches
        device = task.operands.b_dec.device
        top = top_scores(task.share, task.num_selected, batches.num_tokens, device, batches.token_B, task.fixed_size)
        for number in range(len(batches)):
            add_scores(top, batches.scaled(number).flatten(1), task.operands, number * batches.rows)
        selected = top.finish()
        self._codes = list(_by_micro_batch(selected, batches))
        return selected

    def reconstruct(self, number: int, with_auxk: bool) -> tuple[Tensor, Tensor | None]:
        task, x_BW = self._task, self._task.batches.scaled(number).flatten(1)
        codes = Codes(*self._codes[number], *self._auxk_codes(x_BW, with_auxk))
        gradients = self._gradients and self._gradients._replace(accumulate=number > 0)
        recons_BW, e_hat_BW = reconstruct(task.crosscoder, x_BW, codes, task.operands, gradients, task.with_bias)
        return recons_BW, e_hat_BW if with_auxk else None

    def _auxk_codes(self, x_BW: Tensor, with_auxk: bool) -> tuple[Tensor, Tensor]:
        task = self._task
        if not with_auxk or task.candidate_Z is None:
            return task.dead_L.new_empty(0, dtype=torch.int64), x_BW.new_empty(len(x_BW), 0)
        return task.candidate_Z, auxk_codes(x_BW, task.operands, task.candidate_Z, task.dead_L, task.choose)


class ReadableForm:
    """The reference: `train.readable`. One process that sees all scores ranks them by torch.topk."""

    def __init__(self, task: Task, precision: torch.dtype | None):
        self._task, self._precision = task, precision
        self._pre_BL: Tensor | None = None  # of a single micro-batch, with its graph
        self._selections: list[Selection] = []

    def select(self) -> Selected:
        batches = self._task.batches
        if len(batches) == 1:
            self._pre_BL = self._encode(0)
            pre_BL = self._pre_BL.detach()
        else:
            with torch.no_grad():
                pre_BL = torch.cat([self._encode(number) for number in range(len(batches))])
        selected = self._selected(pre_BL)
        self._selections = [selection for selection, _ in _by_micro_batch(selected, batches)]
        return selected

    def reconstruct(self, number: int, with_auxk: bool) -> tuple[Tensor, Tensor | None]:
        task, crosscoder = self._task, self._task.crosscoder
        pre_BL, self._pre_BL = self._encode(number) if self._pre_BL is None else self._pre_BL, None
        b_dec = crosscoder.b_dec if task.with_bias else crosscoder.b_dec * 0
        recons_BW = dense_reconstruction(crosscoder, pre_BL, self._selections[number], b_dec, self._precision)
        if not with_auxk:
            return recons_BW, None
        dead_Z = task.dead_L.nonzero().squeeze(1)
        pre_BZ = pre_BL[:, dead_Z]
        chosen_BZ = task.choose(pre_BZ.detach() * task.operands.scale_L[dead_Z])
        return recons_BW, dense_auxk(crosscoder, pre_BZ, chosen_BZ, dead_Z, self._precision)

    def _encode(self, number: int) -> Tensor:
        x_BW = self._task.batches.scaled(number).flatten(1)
        return dense_codes(self._task.crosscoder, x_BW, self._precision)

    def _selected(self, pre_BL: Tensor) -> Selected:
        task, batches, scale_L = self._task, self._task.batches, self._task.operands.scale_L
        if task.share.everyone.size > 1:
            token_B, device = batches.token_B, pre_BL.device
            top = top_scores(task.share, task.num_selected, batches.num_tokens, device, token_B, task.fixed_size)
            top.add(pre_BL, scale_L)
            return _without_padding(top.finish())
        score_BL = pre_BL * scale_L
        selection = largest(score_BL, task.num_selected)
        return Selected(selection, pre_BL[selection], score_BL[selection], score_BL.new_ones((), dtype=torch.bool))


def _without_padding(selected: Selected) -> Selected:
    """The chosen entries alone. The host waits to know how many there are."""
    positive_S = selected.score_S > 0
    token_S, latent_S = (index_S[positive_S] for index_S in selected.selection)
    selection = Selection(token_S, latent_S)
    return Selected(selection, selected.code_S[positive_S], selected.score_S[positive_S], selected.finite)


def _by_micro_batch(selected: Selected, batches: MicroBatches) -> Iterator[tuple[Selection, Tensor]]:
    """What is kept of each micro-batch, and its codes. Of several the host waits to know where each begins."""
    (token_S, latent_S), code_S = selected.selection, selected.code_S
    if len(batches) == 1:
        yield selected.selection, code_S
        return
    first_token = torch.arange(1, len(batches), device=token_S.device) * batches.rows
    starts = torch.searchsorted(token_S, first_token)
    end_1 = (selected.score_S > 0).sum(0, keepdim=True)  # padding belongs to none
    for number, (start, stop) in enumerate(pairwise([0, *torch.cat([starts, end_1]).tolist()])):
        token_s = token_S[start:stop] - number * batches.rows
        yield Selection(token_s, latent_S[start:stop]), code_S[start:stop]
