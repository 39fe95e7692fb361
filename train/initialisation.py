"""Initial weights of a crosscoder, from a seed and the first batch.

Every latent has, for each model, an encoder and a decoder row of norm 1 that point the same way at first (untied
afterwards); b_enc is zero and b_dec is each model's geometric median. Shapes: B tokens, M models, D width, L latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder


@torch.no_grad()
def initialise(crosscoder: Crosscoder, x_BMD: Tensor, seed: int) -> None:
    """Set all weights of `crosscoder`, maybe of a part of the latents. `x_BMD` is the first global batch, scaled.

    config.init: "same" draws one direction per latent for all models, "random" one per model, "data" takes centred
    tokens. Random numbers are drawn on the CPU from `seed` alone, so that every device, and every rank, starts equal.
    """
    rows_LW = initial_rows(crosscoder.config, x_BMD, seed, crosscoder.latents)
    crosscoder.W_enc.copy_(rows_LW)
    crosscoder.W_dec.copy_(rows_LW)
    crosscoder.b_enc.zero_()
    crosscoder.b_dec.copy_(geometric_medians(x_BMD))
    crosscoder.zero_foreign_rows(crosscoder.W_enc, crosscoder.W_dec)


def initial_rows(config: CrosscoderConfig, x_BMD: Tensor, seed: int, latents: range) -> Tensor:
    """What W_enc and W_dec start from, (l, W) for a contiguous part of the latents, on the CPU; dedicated latents still
    have rows of all models.

    The rows of all L latents are drawn whatever the part, so that they do not depend on how latents are divided: each
    rank spends, once, the time of one process, and 4 L D bytes on its CPU ("random": M times, "data": 3 M times that).
    """
    generator = torch.Generator().manual_seed(seed)
    directions_LMD = _directions(config, x_BMD, generator)[latents.start : latents.stop]
    return torch.nn.functional.normalize(directions_LMD, dim=2).flatten(1)


def geometric_medians(x_BMD: Tensor) -> Tensor:
    """What b_dec starts from, (W,), float64."""
    return torch.cat([geometric_median(x_BMD[:, m]) for m in range(x_BMD.shape[1])])


def _directions(config: CrosscoderConfig, x_BMD: Tensor, generator: torch.Generator) -> Tensor:
    num_latents, (_, num_models, d_model) = config.num_latents, x_BMD.shape
    if config.init == "data":
        return _data_directions(x_BMD.cpu(), num_latents, generator)
    if config.init == "random":
        return torch.randn(num_latents, num_models, d_model, generator=generator)
    return torch.randn(num_latents, 1, d_model, generator=generator).expand(-1, num_models, -1)


def _data_directions(x_BMD: Tensor, num_latents: int, generator: torch.Generator) -> Tensor:
    """Centred tokens in random order, then the same again, each with Gaussian noise of its own norm per model."""
    centred_BMD = (x_BMD - x_BMD.mean(0)).float()
    num_tokens = len(centred_BMD)
    order = torch.randperm(num_tokens, generator=generator)
    directions_LMD = centred_BMD[order.repeat(-(-num_latents // num_tokens))[:num_latents]]
    noise_LMD = torch.randn(directions_LMD.shape, generator=generator)
    noise_LMD *= directions_LMD.norm(dim=2, keepdim=True) / noise_LMD.norm(dim=2, keepdim=True)
    noise_LMD[:num_tokens] = 0.0
    return directions_LMD + noise_LMD


def geometric_median(x_BD: Tensor, max_iterations: int = 1000, tolerance: float = 1e-10) -> Tensor:
    """argmin_y sum_b ||x_b - y||_2, (D,), float64, by Weiszfeld's iteration from the mean.

    A token that the iterate hits would get infinite weight; its distance is floored, which leaves the iterate there.
    Stops when a step is shorter than `tolerance` of the median's distance to the tokens.
    """
    x_BD = x_BD.double()
    median_D = x_BD.mean(0)
    for _ in range(max_iterations):
        distance_B = (x_BD - median_D).norm(dim=1).clamp(min=1e-12)
        weight_B = 1 / distance_B
        moved_D = (weight_B @ x_BD) / weight_B.sum()
        step = (moved_D - median_D).norm()
        median_D = moved_D
        if step <= tolerance * distance_B.mean():
            break
    return median_D
