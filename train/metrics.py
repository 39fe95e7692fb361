"""What a step and a validation pass report; all of it is read off, nothing here changes training state.

Shapes: B tokens, M models, D width, L latents, S selected codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor

from extract.metrics_file import Metrics
from train.batch_topk import Selection
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.histograms import latent_metrics
from train.inference import inference_codes
from train.placement import Share
from train.sparse import add_scores, decode, top_scores

# A batch as it is measured: raw activations (B, M, D), and the number of each token in the batch of all ranks, (B,);
# None where it is the number of the row.
Batch = tuple[Tensor, Tensor | None]


class VarianceExplained:
    """Per model 1 - sum_t ||x_t - recons_t||^2 / sum_t ||x_t - mean||^2 over all tokens added; sums in float64.

    `sums` holds them in one tensor, which ranks add up: number of tokens, sum_t x (M * D), sum_t ||x||^2 (M), sum_t
    ||x - recons||^2 (M).
    """

    def __init__(self, num_models: int, d_model: int, device: torch.device):
        self._shape = num_models, d_model
        self.sums = torch.zeros(1 + num_models * (d_model + 2), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x_BMD: Tensor, recons_BMD: Tensor) -> None:
        squares_M = x_BMD.square().sum((0, 2), dtype=torch.float64)
        errors_M = (x_BMD - recons_BMD).square().sum((0, 2), dtype=torch.float64)
        self.sums[0] += len(x_BMD)
        self.sums[1:] += torch.cat([x_BMD.sum(0, dtype=torch.float64).flatten(), squares_M, errors_M])

    def values(self) -> list[float]:
        """One number per model; nan where the tokens do not vary."""
        num_models, d_model = self._shape
        count, sum_MD, squares_M, errors_M = self.sums.split([1, num_models * d_model, num_models, num_models])
        variation_M = squares_M - sum_MD.view(self._shape).square().sum(1) / count
        return torch.where(variation_M > 0, 1 - errors_M / variation_M, torch.nan).tolist()

    def named(self, prefix: str, models: list[str]) -> dict[str, float]:
        return {f"{prefix}/{model}": value for model, value in zip(models, self.values(), strict=True)}


@torch.no_grad()
def validation_metrics(
    crosscoder: Crosscoder, batches: Iterable[Batch], operands: Operands | None = None, share: Share | None = None
) -> Metrics:
    """Variance explained, L0 and `latent_metrics` over batches, with the codes of `evaluation_codes`.

    Ranks of share.tokens have different tokens of each batch, maybe none; those of share.latents have the same tokens.
    All see equally many batches and get the same metrics. Without `operands` and `share` there is one rank.
    """
    operands, share = operands or Operands.of(crosscoder), share or Share(crosscoder.num_latents)
    device = operands.b_dec.device
    explained = VarianceExplained(crosscoder.num_models, crosscoder.d_model, device)
    fired_L = torch.zeros(share.num_latents, dtype=torch.float64, device=device)
    for raw_BMD, token_B in batches:
        x_BMD = crosscoder.scale(raw_BMD.to(device))
        token_B = None if token_B is None else token_B.to(device)
        selection, code_S = evaluation_codes(crosscoder, x_BMD.flatten(1), operands, share, token_B)
        fired_L.index_add_(0, selection.latent + share.first_latent, torch.ones_like(code_S, dtype=fired_L.dtype))
        if len(x_BMD):
            recons_BW = decode(selection, code_S, len(x_BMD), operands, with_bias=share.latents.rank == 0)
            explained.add(x_BMD, share.latents.sum(recons_BW, "reconstructions of validation").view_as(x_BMD))
    share.tokens.sum(explained.sums, "sums of validation")
    share.everyone.sum(fired_L, "codes of validation")
    num_tokens = explained.sums[0].item()
    if num_tokens == 0:
        return {}
    return {
        "val/l0": fired_L.sum().item() / num_tokens,
        **explained.named("val/variance_explained", crosscoder.models),
        **latent_metrics(crosscoder, fired_L, num_tokens, operands, share),
    }


@torch.no_grad()
def evaluation_codes(
    crosscoder: Crosscoder,
    x_BW: Tensor,
    operands: Operands,
    share: Share | None = None,
    token_B: Tensor | None = None,
) -> tuple[Selection, Tensor]:
    """Codes (S,) of scaled activations and where they are: those above the threshold, or the k * B largest while there
    is none. `operands` are those of the crosscoder; the codes before selection never exist whole.

    With `share`, B is of all ranks, `token_B` has this rank's numbers among them, and the codes are of its latents.
    """
    if crosscoder.threshold is not None:
        return inference_codes(crosscoder.threshold, x_BW, operands)
    share = share or Share(crosscoder.num_latents)
    num_tokens = int(share.tokens.sum(torch.tensor(len(x_BW), device=x_BW.device), "tokens of validation"))
    top = top_scores(share, crosscoder.config.k * num_tokens, num_tokens, x_BW.device, token_B)
    add_scores(top, x_BW, operands)
    (token_S, latent_S), code_S, _, _ = top.finish()
    is_code_S = code_S > 0
    return Selection(token_S[is_code_S], latent_S[is_code_S]), code_S[is_code_S]


@torch.no_grad()
def reconstructions(crosscoder: Crosscoder, raw_bMD: Tensor, operands: Operands, share: Share | None = None) -> Tensor:
    """Raw reconstructions (b, M, D) of this rank's raw activations, with the codes above the threshold, which there is.

    The ranks of share.latents, each with as many tokens as it may have, exchange tokens and partial reconstructions.
    """
    share = share or Share(crosscoder.num_latents)
    latents, num_own = share.latents, len(raw_bMD)
    x_BMD = crosscoder.scale(raw_bMD.to(operands.b_dec.device))
    if latents.size > 1:
        most = -int(latents.min(torch.tensor(-num_own, device=x_BMD.device), "the most tokens of a rank"))
        padding = x_BMD.new_zeros(most - num_own, *x_BMD.shape[1:])
        x_BMD = latents.gather(torch.cat([x_BMD, padding]), "tokens to reconstruct")
    if not len(x_BMD):
        return x_BMD
    assert crosscoder.threshold is not None
    selection, code_S = inference_codes(crosscoder.threshold, x_BMD.flatten(1), operands)
    recons_BW = decode(selection, code_S, len(x_BMD), operands, with_bias=latents.rank == 0)
    return crosscoder.unscale(latents.sum_parts(recons_BW, "reconstructions")[:num_own].view(-1, *x_BMD.shape[1:]))


class Throughput:
    """Tokens a second, the share of time spent waiting for data, since the last reading, and what `roofline`, if there
    is one, says to that.
    """

    def __init__(self, roofline: Callable[[float, int], float] | None = None) -> None:
        self._roofline = roofline
        self.restart()

    def restart(self) -> None:
        """Begin anew: the time since the last reading was not spent on training."""
        self._start, self._tokens, self._waited = time.perf_counter(), 0, 0.0

    def count(self, tokens: int, waited: float) -> None:
        self._tokens += tokens
        self._waited += waited

    def read(self, num_dead: int) -> dict[str, float]:
        """The values, of steps with `num_dead` dead latents."""
        seconds = time.perf_counter() - self._start
        speed = self._tokens / seconds
        values = {"speed/tokens_per_second": speed, "speed/data_wait": self._waited / seconds}
        if self._roofline is not None:
            values["speed/roofline"] = self._roofline(speed, num_dead)
        self.restart()
        return values


def memory_metrics(device: torch.device) -> dict[str, float]:
    """What this process takes of the host's memory, and the most that its tensors took of a GPU's, in 10^9 bytes."""
    values = {"memory/host_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        values["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values
