"""The training objective, as the sum of shares that ranks and micro-batches compute from their own tokens.

    L = recons + auxk_alpha * auxk + delta_weight * delta
    recons = mean over tokens and models of ||x_m - recons_m||_2, with config.loss "squared" of its square
    auxk   = ||e - e_hat||^2 / ||e - mean_t e||^2
             where e = x - recons, detached, and e_hat its reconstruction from dead latents, without bias
    delta  = sum over m > 0 of mean_t ||(x_m - x_0) - (recons_m - recons_0)||_2

Means run over the tokens of the whole batch, and so does the variance that auxk is divided by; shares of tokens then
add up to the loss, and their gradients to its gradient. A norm's gradient at zero is zero.

Sources: arXiv 2504.02922, AuxK arXiv 2406.04093, delta arXiv 2603.04426.
Shapes: b tokens of a share, B of the batch, M models, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import CrosscoderConfig

# What is left of a variance, relative to the squares, by the rounding of equal float32 errors, or of sums in float64.
ROUNDING = 2.0**-44
PIECE_SIZE = 1 << 22  # numbers that are widened to float64 at a time


@dataclass
class Losses:
    """Terms of the objective, scalars with their graph; `total` is their weighted sum."""

    total: Tensor
    reconstruction: Tensor
    auxk: Tensor
    delta: Tensor


class ErrorSums:
    """sum_t e and sum_t ||e||^2 of the errors (b, M, D) that were added, in float64.

    `values` (M * D + 1,) holds both, so that ranks sum them at once.
    """

    def __init__(self, width: int, device: torch.device):
        self.values = torch.zeros(width + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, error_bMD: Tensor) -> ErrorSums:
        error_bW = error_bMD.flatten(1)
        for rows_nW in error_bW.split(max(1, PIECE_SIZE // error_bW.shape[1])):
            wide_nW = rows_nW.double()
            self.values[:-1] += wide_nW.sum(0)
            self.values[-1] += torch.dot(wide_nW.flatten(), wide_nW.flatten())
        return self

    def variance(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """sum_t ||e_t - mean_t e||^2 of `num_tokens` tokens, in `dtype`; 0 where it is below rounding."""
        variance = self.values[-1] - self.values[:-1].square().sum() / num_tokens
        floor = (ROUNDING * self.values[-1]).clamp(min=torch.finfo(dtype).tiny)
        return torch.where(variance > floor, variance, 0.0).to(dtype)


def loss_share(
    config: CrosscoderConfig,
    error_bMD: Tensor,
    num_tokens: int,
    error_recons_bMD: Tensor | None = None,
    variance: Tensor | None = None,
) -> Losses:
    """What the tokens of `error_bMD` = x - recons add to the objective of a batch of `num_tokens`.

    `error_recons_bMD` is AuxK's reconstruction of the error and `variance` that of the whole batch's error; without
    them, or where the variance is 0, auxk is 0.
    """
    reconstruction = reconstruction_loss(error_bMD, config.loss, num_tokens)
    auxk = delta = reconstruction.new_zeros(())
    total = reconstruction
    if error_recons_bMD is not None and variance is not None:
        auxk = auxk_loss(error_bMD.detach(), error_recons_bMD, variance)
        total = total + config.auxk_alpha * auxk
    if config.delta_weight > 0:
        delta = delta_loss(error_bMD, num_tokens)
        total = total + config.delta_weight * delta
    return Losses(total, reconstruction, auxk, delta)


def reconstruction_loss(error_bMD: Tensor, kind: str, num_tokens: int) -> Tensor:
    """Sum of ||e_m||_2 ("norm") or ||e_m||_2^2 ("squared") over tokens and models, over M * `num_tokens`."""
    divisor = num_tokens * error_bMD.shape[1]
    if kind == "squared":
        return error_bMD.square().sum() / divisor
    return torch.linalg.vector_norm(error_bMD, dim=2).sum() / divisor


def auxk_loss(error_bMD: Tensor, error_recons_bMD: Tensor, variance: Tensor) -> Tensor:
    """Squared error of the reconstructed error over the error's variance in the whole batch; 0 where that is 0."""
    squared_error = (error_bMD - error_recons_bMD).square().sum()
    return torch.where(variance > 0, squared_error / torch.where(variance > 0, variance, 1.0), 0.0)


def delta_loss(error_bMD: Tensor, num_tokens: int) -> Tensor:
    """Sum over tokens and tuned models of the norm of e_m - e_0, the error of their difference to the base, over
    `num_tokens`.
    """
    return torch.linalg.vector_norm(error_bMD[:, 1:] - error_bMD[:, :1], dim=2).sum() / num_tokens
