"""One training step up to the gradients, the same in all engines and for any number of ranks and micro-batches.

    1  encode every micro-batch, rank all scores of all ranks together
    2  for each micro-batch: reconstruct it from the kept codes, and from AuxK's; differentiate its share of the loss

The k * B largest scores of the whole batch are chosen before anything is differentiated, and the loss is divided by
numbers of the whole batch, so shares of the loss and of the gradient add up to those of one batch on one rank. Where
ranks divide the latents, each reconstructs the tokens of all from its own latents, and partial sums are added up.

Shapes: rows of a micro-batch as R * m (`train.micro_batches`), of which m are this rank's, M models, D width,
W = M * D.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.batch_topk import Selected
from train.forms import Form, Task
from train.losses import ErrorSums, loss_share
from train.metrics import VarianceExplained
from train.placement import Placement
from train.ranks import Parts


@dataclass(frozen=True)
class Outcome:
    """What a step found, besides the gradients; but `selected`, which is this rank's, the same on all ranks."""

    selected: Selected
    # float64: total, reconstruction, auxk, delta; codes of the whole batch; dead latents.
    losses_4: Tensor
    num_codes: Tensor
    num_dead: Tensor
    # Where the step was measured.
    explained: VarianceExplained | None

    def metrics(self, models: list[str], num_tokens: int) -> dict[str, float]:
        """Loss terms, codes per token, dead latents, and variance explained of a batch of `num_tokens`."""
        total, reconstruction, auxk, delta = self.losses_4.tolist()
        explained = {} if self.explained is None else self.explained.named("train/variance_explained", models)
        return {
            "train/loss": total,
            "train/reconstruction": reconstruction,
            "train/auxk": auxk,
            "train/delta": delta,
            "train/l0": self.num_codes.item() / num_tokens,
            "train/dead": int(self.num_dead),
            **explained,
        }


class Step:
    """The loss of a step, a micro-batch at a time, and what is known once all have been differentiated."""

    def __init__(self, task: Task, form: Form, measured: bool):
        self._task, self._form = task, form
        crosscoder, device = task.crosscoder, task.dead_L.device
        self._explained = VarianceExplained(crosscoder.num_models, crosscoder.d_model, device) if measured else None
        self._reconstruction: tuple[Tensor, Tensor] | None = None
        self._selected: Selected | None = None
        self._losses_4 = torch.zeros(4, dtype=torch.float64, device=device)
        self._variance: Tensor | None = None

    def loss(self, number: int) -> Tensor:
        """This rank's share of the loss for a micro-batch, with its graph. Asked for in ascending order."""
        if number == 0:
            self._selected = self._form.select()
            self._variance = self._variance_beforehand()
        x_bMD = self._task.batches.own(number)
        recons_bMD, e_hat_bMD = self._own(self._form.reconstruct(number, self._has_auxk))
        error_bMD = x_bMD - recons_bMD
        if self._has_auxk and self._variance is None:
            self._variance = self._variance_of([error_bMD.detach()])
        losses = loss_share(self._task.config, error_bMD, self._task.batches.num_tokens, e_hat_bMD, self._variance)
        terms = losses.total, losses.reconstruction, losses.auxk, losses.delta
        self._losses_4 += torch.stack([term.detach() for term in terms])
        self._reconstruction = x_bMD, recons_bMD.detach()
        return losses.total

    def measure(self) -> None:
        """Note how well the last micro-batch was reconstructed: once it is differentiated there is memory for that."""
        if self._explained is not None and self._reconstruction is not None:
            self._explained.add(*self._reconstruction)
        self._reconstruction = None

    def outcome(self) -> Outcome:
        assert self._selected is not None
        share, dead_L = self._task.share, self._task.dead_L
        num_codes = (self._selected.score_S > 0).sum()
        num_dead = dead_L.sum() if share.tokens.rank == 0 else torch.zeros_like(num_codes)
        sums = torch.cat([self._losses_4, torch.stack([num_codes, num_dead])])
        explained = self._explained
        if explained is not None:
            sums = torch.cat([sums, explained.sums])
        share.everyone.sum(sums, "losses")
        if explained is not None:
            explained.sums = sums[6:]
        return Outcome(self._selected, sums[:4], sums[4], sums[5], explained)

    @property
    def _has_auxk(self) -> bool:
        return self._task.candidate_Z is not None

    def _variance_beforehand(self) -> Tensor | None:
        """That of all errors, where the first of several micro-batches needs it before the last is differentiated."""
        numbers = range(len(self._task.batches))
        if not self._has_auxk or len(numbers) == 1:
            return None
        with torch.no_grad():
            return self._variance_of(self._error(number) for number in numbers)

    def _error(self, number: int) -> Tensor:
        recons_bMD, _ = self._own(self._form.reconstruct(number, False))
        return self._task.batches.own(number) - recons_bMD

    def _variance_of(self, errors: Iterable[Tensor]) -> Tensor:
        """The variance of the error of the whole batch, of which this rank has `errors`; 0 where no latent is dead."""
        task, W_dec = self._task, self._task.operands.W_dec
        sums, dtype = ErrorSums(W_dec.shape[1], W_dec.device), task.operands.b_dec.dtype
        for error_bMD in errors:
            sums.add(error_bMD)
        task.share.everyone.sum(sums.values, "variance of the error")
        return torch.where(task.any_dead, sums.variance(task.batches.num_tokens, dtype), 0.0)

    def _own(self, parts: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Of partial sums (R * m, W) for all tokens the sums (m, M, D) of this rank's tokens."""
        recons_BW, e_hat_BW = parts
        return self._summed(recons_BW, "reconstructions"), (
            None if e_hat_BW is None else self._summed(e_hat_BW, "reconstructions of the error")
        )

    def _summed(self, partial_BW: Tensor, what: str) -> Tensor:
        crosscoder, group = self._task.crosscoder, self._task.share.latents
        own_bW = Parts.apply(partial_BW, group, what) if group.size > 1 else partial_BW
        return own_bW.view(-1, crosscoder.num_models, crosscoder.d_model)


def differentiate(placement: Placement, step: Step, num_micro_steps: int) -> Outcome:
    """Leave the gradients of the whole step's loss, as far as it is this rank's, with the placement."""
    for number in range(num_micro_steps):
        placement.backward(step.loss(number))
        step.measure()
    return step.outcome()
