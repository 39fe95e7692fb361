"""What a step and a validation pass report; all of it is read off, nothing here changes training state.

Shapes: B tokens, M models, D width, L latents, S selected codes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from train.batch_topk import Selection, select
from train.crosscoder import Crosscoder
from train.losses import Forward, Losses
from train.sparse import sparse_reconstruction


class VarianceExplained:
    """Per model 1 - sum_t ||x_t - recons_t||^2 / sum_t ||x_t - mean||^2 over all tokens added; sums in float64."""

    def __init__(self, num_models: int, d_model: int, device: torch.device):
        self._count = 0
        self._sum_MD = torch.zeros(num_models, d_model, dtype=torch.float64, device=device)
        self._squares_M = torch.zeros(num_models, dtype=torch.float64, device=device)
        self._errors_M = torch.zeros_like(self._squares_M)

    def add(self, x_BMD: Tensor, recons_BMD: Tensor) -> None:
        self._count += len(x_BMD)
        self._sum_MD += x_BMD.sum(0, dtype=torch.float64)
        self._squares_M += x_BMD.square().sum((0, 2), dtype=torch.float64)
        self._errors_M += (x_BMD - recons_BMD).square().sum((0, 2), dtype=torch.float64)

    def values(self) -> list[float]:
        """One number per model; nan where the tokens do not vary."""
        variation_M = self._squares_M - self._sum_MD.square().sum(1) / self._count
        return torch.where(variation_M > 0, 1 - self._errors_M / variation_M, torch.nan).tolist()


@torch.no_grad()
def step_metrics(crosscoder: Crosscoder, x_BMD: Tensor, forward: Forward, losses: Losses) -> dict[str, float]:
    """Loss terms, variance explained of the batch, and L0 = codes per token of a training step."""
    explained = VarianceExplained(crosscoder.num_models, crosscoder.d_model, x_BMD.device)
    explained.add(x_BMD, forward.recons_BMD)
    return {
        "train/loss": losses.total.item(),
        "train/reconstruction": losses.reconstruction.item(),
        "train/auxk": losses.auxk.item(),
        "train/delta": losses.delta.item(),
        "train/l0": len(forward.score_S) / len(x_BMD),
        **_named("train/variance_explained", crosscoder, explained),
    }


@torch.no_grad()
def validation_metrics(crosscoder: Crosscoder, batches: Iterable[Tensor]) -> dict[str, float]:
    """Variance explained and L0 over raw batches (B, M, D), with the codes of `evaluation_codes`."""
    device = crosscoder.W_enc.device
    explained = VarianceExplained(crosscoder.num_models, crosscoder.d_model, device)
    num_tokens = num_codes = 0
    for raw_BMD in batches:
        x_BMD = crosscoder.scale(raw_BMD.to(device))
        selection, code_S = evaluation_codes(crosscoder, x_BMD)
        explained.add(x_BMD, sparse_reconstruction(crosscoder, selection, code_S, len(x_BMD)))
        num_tokens += len(x_BMD)
        num_codes += len(code_S)
    if num_tokens == 0:
        return {}
    return {"val/l0": num_codes / num_tokens, **_named("val/variance_explained", crosscoder, explained)}


def evaluation_codes(crosscoder: Crosscoder, x_BMD: Tensor) -> tuple[Selection, Tensor]:
    """Codes (S,) of scaled activations and where they are: those above the threshold, or the k * B largest while there
    is none.
    """
    pre_BL = crosscoder.pre_activations(x_BMD)
    score_BL = pre_BL * crosscoder.latent_scale()
    if crosscoder.threshold is None:
        selection = select(score_BL, crosscoder.config.k * len(x_BMD))
    else:
        selection = Selection(*(score_BL > crosscoder.threshold).nonzero(as_tuple=True))
    return selection, pre_BL[selection]


def _named(prefix: str, crosscoder: Crosscoder, explained: VarianceExplained) -> dict[str, float]:
    return {f"{prefix}/{model}": value for model, value in zip(crosscoder.models, explained.values(), strict=True)}


class Throughput:
    """Tokens a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._start, self._tokens, self._waited = time.perf_counter(), 0, 0.0

    def count(self, tokens: int, waited: float) -> None:
        self._tokens += tokens
        self._waited += waited

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        values = {"speed/tokens_per_second": self._tokens / seconds, "speed/data_wait": self._waited / seconds}
        self._start, self._tokens, self._waited = time.perf_counter(), 0, 0.0
        return values
