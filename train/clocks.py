"""What a run counts, on the device: how long each latent was silent, the inference threshold, the first bad step.

Counters are those of the whole batch, whatever rank read a token: a latent fired if it fired on any rank. Advancing
never makes the host wait for the device. A step that is not finite stops the clocks, and with them everything that asks
`judge`: from then on nothing changes until the host looks and `raise_if_failed` tells it.

Shapes: B tokens of the batch, L latents of this rank, S selected codes of this rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from train.config import CrosscoderConfig
from train.pieces import Piece, SavedState
from train.placement import Share


class Clocks:
    """Counters of one run, of this rank's latents. `advance` and `load` are collective; no other method sends anything.

    Attributes:
        silent_tokens_L: tokens of all ranks since each latent last fired, int64.
        recount_steps: steps after which `candidates` counts again, at most; it changes no result but by rounding.
    """

    def __init__(self, config: CrosscoderConfig, num_latents: int, share: Share, device: torch.device):
        self._config, self._share, self.recount_steps = config, share, 100
        self.silent_tokens_L = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self._longest = self.silent_tokens_L.new_zeros(())  # silence of any latent of any rank
        self._candidate_Z: Tensor | None = None
        self._horizon = 0  # the candidates are valid for so many tokens more
        # Both as the host reads them: nan before there is a threshold; step -1 while no step failed.
        self._threshold = torch.full((), math.nan, dtype=torch.float64, device=device)
        self._failure = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # step, loss, gradient norm

    def dead(self) -> Tensor:
        """Mask (L,) of the latents silent for `dead_after_tokens` or more."""
        return self.silent_tokens_L >= self._config.dead_after_tokens

    def any_dead(self) -> Tensor:
        """Whether a latent of any rank is dead: bool, on the device."""
        return self._longest >= self._config.dead_after_tokens

    def candidates(self, num_tokens: int, exact: bool) -> Tensor | None:
        """Indices (Z,) of this rank's latents, among them all that are dead now, for a step of `num_tokens` tokens.

        None, on all ranks, where no latent of any rank can be dead. `exact` asks for the dead ones alone; counting them
        makes the host wait for a GPU. Otherwise those are counted that can be dead within the next steps, and the host
        does not look again until these are over.
        """
        if exact:
            return self._silent_for(self._config.dead_after_tokens)
        if self._horizon < num_tokens:
            self._horizon = max(num_tokens, min(self.recount_steps * num_tokens, self._config.dead_after_tokens // 8))
            self._candidate_Z = self._silent_for(self._config.dead_after_tokens - self._horizon)
        self._horizon -= num_tokens
        return self._candidate_Z

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor, finite: Tensor) -> Tensor:
        """Whether this step or one before it was not finite (bool, on the device): then nothing may change any more.

        `finite` says whether all scores were. All arguments are the same on all ranks, and so is the answer.
        """
        fine = loss.isfinite() & grad_norm.isfinite() & finite
        now = torch.stack([torch.full_like(self._failure[0], step), loss.double(), grad_norm.double()])
        self._failure = torch.where(fine | self._has_failed(), self._failure, now)
        return self._has_failed()

    def advance(self, latent_S: Tensor, score_S: Tensor, num_tokens: int, step: int, failed: Tensor) -> None:
        """Count a step of `num_tokens` tokens, of all ranks, unless it `failed`.

        This rank selected `latent_S` with scores `score_S`, where 0 is padding. The threshold is the moving average of
        the smallest positive selected score of each batch from `threshold_start_step` on, the first as it is.
        """
        quiet_L, smallest = self._seen(latent_S, score_S)
        advanced_L = torch.where(quiet_L, self.silent_tokens_L + num_tokens, 0)
        self.silent_tokens_L = torch.where(failed, self.silent_tokens_L, advanced_L)
        smallest = self._seen_by_all(smallest)
        if step >= self._config.threshold_start_step:
            decay, before = self._config.threshold_decay, self._threshold
            after = torch.where(before.isnan(), smallest, decay * before + (1 - decay) * smallest)
            self._threshold = torch.where(failed | smallest.isinf(), before, after)

    def raise_if_failed(self) -> None:
        """FloatingPointError, once, when a step was not finite. Its `step` tells which; all is as before it."""
        step, loss, grad_norm = self._failure.tolist()
        if step < 0:
            return
        self._failure = torch.full_like(self._failure, -1.0)
        raise NotFinite(int(step), loss, grad_norm)

    def pieces(self) -> dict[str, Piece]:
        """The counters of latents, and which of these are candidates: the order of a sum may depend on it."""
        if self._share.tokens.rank != 0:
            return {}
        is_candidate_L = torch.zeros_like(self.silent_tokens_L, dtype=torch.uint8)
        if self._candidate_Z is not None:
            is_candidate_L[self._candidate_Z] = 1
        first, num_latents = self._share.first_latent, self._share.num_latents
        return {
            "silent_tokens": Piece(self.silent_tokens_L, first, num_latents),
            "auxk_candidates": Piece(is_candidate_L, first, num_latents),
        }

    def values(self) -> dict[str, Any]:
        """The rest of the state. Whether no rank has candidates is one fact, which ranks without any must know."""
        has_candidates = self._candidate_Z is not None
        return {"threshold": self.threshold, "auxk_tokens": self._horizon, "auxk_any": has_candidates}

    def load(self, saved: SavedState) -> None:
        """Continue from what `pieces` and `values` gave, on any ranks."""
        first, device = self._share.first_latent, self.silent_tokens_L.device
        rows = first, first + len(self.silent_tokens_L)
        self.silent_tokens_L = saved.rows("silent_tokens", *rows).to(device, copy=True)
        is_candidate_L = saved.rows("auxk_candidates", *rows).to(device)
        self._candidate_Z = is_candidate_L.nonzero().squeeze(1) if saved.values["auxk_any"] else None
        self._horizon = saved.values["auxk_tokens"]
        threshold = saved.values["threshold"]
        self._threshold.fill_(math.nan if threshold is None else threshold)
        self._seen_by_all(torch.full_like(self._threshold, math.inf))

    @property
    def threshold(self) -> float | None:
        """The threshold of scaled codes at inference; the host waits for it."""
        value = self._threshold.item()
        return None if math.isnan(value) else value

    def _silent_for(self, num_tokens: int) -> Tensor | None:
        if self._longest < num_tokens:
            return None
        return (self.silent_tokens_L >= num_tokens).nonzero().squeeze(1)

    def _seen(self, latent_S: Tensor, score_S: Tensor) -> tuple[Tensor, Tensor]:
        """Mask (L,) of the latents that fired on no rank of share.tokens, and the smallest positive score there."""
        num_fired_L = torch.zeros_like(self.silent_tokens_L).index_add_(0, latent_S, (score_S > 0).long())
        none_1 = score_S.new_full((1,), math.inf)
        smallest_1 = torch.where(score_S > 0, score_S, math.inf).min(0, keepdim=True).values if len(score_S) else none_1
        seen_L1 = torch.cat([(num_fired_L == 0).to(score_S.dtype), smallest_1])
        self._share.tokens.min(seen_L1, "fired latents")
        return seen_L1[:-1] > 0, seen_L1[-1]

    def _seen_by_all(self, smallest: Tensor) -> Tensor:
        """The smallest over the ranks that divide the latents, in float64; their longest silence is noted."""
        both_2 = torch.stack([smallest.double(), -self.silent_tokens_L.max().double()])
        self._share.latents.min(both_2, "threshold and silence")
        self._longest = -both_2[1].long()
        return both_2[0]

    def _has_failed(self) -> Tensor:
        return self._failure[0] >= 0


class NotFinite(FloatingPointError):
    """Step `step` met a number that is not finite; nothing changed in it, nor since."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        scores = "" if not math.isfinite(loss + grad_norm) else " Scores are not: the weights hold nan or inf."
        super().__init__(f"At step {step} the loss is {loss:g} and its gradient's norm {grad_norm:g}.{scores}")
        self.step = step
