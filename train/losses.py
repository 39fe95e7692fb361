"""The training objective, and the readable form of the step that leads to it.

    L = recons + auxk_alpha * auxk + delta_weight * delta
    recons = mean over tokens and models of ||x_m - recons_m||_2, with config.loss "squared" of its square
    auxk   = ||e - e_hat||^2 / ||e - mean_t e||^2
             where e = x - recons, detached, and e_hat its reconstruction from dead latents, without bias
    delta  = sum over m > 0 of mean_t ||(x_m - x_0) - (recons_m - recons_0)||_2

A norm's gradient at zero is zero. Sources: arXiv 2504.02922, AuxK arXiv 2406.04093, delta arXiv 2603.04426.
Shapes: B tokens, M models, D width, W = M * D, L latents, S selected codes, Z dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.batch_topk import Selection, select
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder


@dataclass
class Forward:
    """What both forms of the step compute from a batch: reconstructions with their graph, and what was selected."""

    recons_BMD: Tensor
    # AuxK's reconstruction of the error (B, M, D); None while no latent is dead.
    error_recons_BMD: Tensor | None
    selection: Selection
    # Scaled codes pre * s of the selection, (S,), without graph.
    score_S: Tensor


@dataclass
class Losses:
    """Terms of the objective, scalars with their graph; `total` is their weighted sum."""

    total: Tensor
    reconstruction: Tensor
    auxk: Tensor
    delta: Tensor


def readable_forward(crosscoder: Crosscoder, x_BMD: Tensor, num_selected: int, dead_L: Tensor) -> Forward:
    """The training step in dense autograd.

    `x_BMD` is scaled; `num_selected` is k * B of the global batch; `dead_L` masks dead latents.

    `train.sparse.sparse_forward` equals it to rounding, gradients and selection included.
    """
    pre_BL = crosscoder.pre_activations(x_BMD)
    score_BL = pre_BL.detach() * crosscoder.latent_scale()
    selection = select(score_BL, num_selected)
    acts_BL = torch.zeros_like(pre_BL).index_put(tuple(selection), pre_BL[selection])
    error_recons_BMD = None
    if crosscoder.config.auxk_alpha > 0 and dead_L.any():
        pre_BZ = pre_BL[:, dead_L]
        aux_BZ = pre_BZ * auxk_mask(pre_BZ.detach() * crosscoder.latent_scale()[dead_L], crosscoder.d_model)
        error_recons_BMD = (aux_BZ @ crosscoder.W_dec[dead_L]).view_as(x_BMD)
    return Forward(crosscoder.reconstruct(acts_BL), error_recons_BMD, selection, score_BL[selection])


def auxk_mask(score_BZ: Tensor, d_model: int) -> Tensor:
    """Per token, 1 for the min(D // 2, Z) dead latents with the largest scaled codes, 0 for the others."""
    num_chosen = min(d_model // 2, score_BZ.shape[1])
    chosen_BK = score_BZ.topk(num_chosen, dim=1, sorted=False).indices
    return torch.zeros_like(score_BZ).scatter_(1, chosen_BK, 1.0)


def training_losses(config: CrosscoderConfig, x_BMD: Tensor, forward: Forward) -> Losses:
    """The objective of a batch of scaled activations."""
    error_BMD = x_BMD - forward.recons_BMD
    reconstruction = reconstruction_loss(error_BMD, config.loss)
    auxk = delta = reconstruction.new_zeros(())
    total = reconstruction
    if forward.error_recons_BMD is not None:
        auxk = auxk_loss(error_BMD.detach(), forward.error_recons_BMD)
        total = total + config.auxk_alpha * auxk
    if config.delta_weight > 0:
        delta = delta_loss(error_BMD)
        total = total + config.delta_weight * delta
    return Losses(total, reconstruction, auxk, delta)


def reconstruction_loss(error_BMD: Tensor, kind: str) -> Tensor:
    """Mean over tokens and models of ||e_m||_2 ("norm") or ||e_m||_2^2 ("squared")."""
    if kind == "squared":
        return error_BMD.square().sum(2).mean()
    return torch.linalg.vector_norm(error_BMD, dim=2).mean()


def auxk_loss(error_BMD: Tensor, error_recons_BMD: Tensor) -> Tensor:
    """Squared error of the reconstructed error over the error's variance in the batch; 0 for one token."""
    variance = (error_BMD - error_BMD.mean(0)).square().sum()
    squared_error = (error_BMD - error_recons_BMD).square().sum()
    return torch.where(variance > 0, squared_error / variance.clamp(min=torch.finfo(variance.dtype).tiny), 0.0)


def delta_loss(error_BMD: Tensor) -> Tensor:
    """Sum over tuned models of the mean norm of e_m - e_0, the error of their difference to the base."""
    return torch.linalg.vector_norm(error_BMD[:, 1:] - error_BMD[:, :1], dim=2).mean(0).sum()
