"""The readable step of one process, from a batch to its losses: what the other form, and engines, are compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from train.batch_topk import Selection
from train.losses import ErrorSums, Losses, loss_share
from train.ranks import Group
from train.readable import dense_auxk, dense_codes, dense_reconstruction, largest
from train.row_cut import row_cut


class Readable(NamedTuple):
    selection: Selection
    score_S: torch.Tensor
    losses: Losses
    error_BMD: torch.Tensor
    error_recons_BMD: torch.Tensor | None


def readable_losses(crosscoder, x_BMD, num_selected, dead_L, precision=None):
    """`x_BMD` is scaled; `num_selected` is k * B."""
    pre_BL = dense_codes(crosscoder, x_BMD.flatten(1), precision)
    score_BL = pre_BL.detach() * crosscoder.latent_scale()
    selection = largest(score_BL, num_selected)
    recons_BW = dense_reconstruction(crosscoder, pre_BL, selection, crosscoder.b_dec, precision)
    error_BMD = x_BMD - recons_BW.view_as(x_BMD)
    error_recons_BMD = variance = None
    if crosscoder.config.auxk_alpha > 0 and dead_L.any():
        dead_Z = dead_L.nonzero().squeeze(1)
        chosen_BZ = row_cut(score_BL[:, dead_Z], crosscoder.d_model // 2, Group())
        error_recons_BMD = dense_auxk(crosscoder, pre_BL[:, dead_Z], chosen_BZ, dead_Z, precision).view_as(x_BMD)
        sums = ErrorSums(x_BMD[0].numel(), x_BMD.device).add(error_BMD.detach())
        variance = sums.variance(len(x_BMD), x_BMD.dtype)
    losses = loss_share(crosscoder.config, error_BMD, len(x_BMD), error_recons_BMD, variance)
    return Readable(selection, score_BL[selection], losses, error_BMD, error_recons_BMD)
