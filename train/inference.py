"""Codes at inference, sparse: what `Crosscoder.encode` gives, without a (B, L) tensor.

    pre = ReLU( x W_enc^T + b_enc ),   codes = pre where pre * s > threshold

Shapes: B tokens, W = M * D (M models of width D), L latents, C latents of a chunk, S codes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from train.batch_topk import Selection
from train.encoder import Operands, encoder_chunks


@torch.no_grad()
def inference_codes(
    threshold: float, x_BW: Tensor, operands: Operands, watch: Callable[[int, Tensor], None] | None = None
) -> tuple[Selection, Tensor]:
    """The nonzero codes (S,) of scaled activations and where they are, sorted by token, then latent.

    `watch(first, pre_BC)`, where given, sees the product of each chunk of latents from `first` on, before the ReLU. It
    is valid during the call alone.
    """
    parts = []
    # Buffers of all chunks: on a CPU fresh memory costs more than what is computed into it.
    scaled, is_above = x_BW.new_empty(0, dtype=operands.scale_L.dtype), torch.empty(0, dtype=torch.bool)
    for first, pre_BC in encoder_chunks(x_BW, operands):
        if watch is not None:
            watch(first, pre_BC)
        if first == 0:
            dtype = torch.result_type(pre_BC, operands.scale_L)
            scaled = torch.empty_like(pre_BC, dtype=dtype).view(-1)
            is_above = torch.empty_like(pre_BC, dtype=torch.bool).view(-1)
        size = pre_BC.numel()
        # Where the product with s >= 0 exceeds a number that is not negative, pre is positive: the ReLU is implied.
        scale_C = operands.scale_L[first : first + pre_BC.shape[1]]
        scores_BC = torch.mul(pre_BC, scale_C, out=scaled[:size].view_as(pre_BC))
        places_S = _places_above(scores_BC.view(-1), max(threshold, 0.0), is_above[:size])
        token_S = places_S // pre_BC.shape[1]
        parts.append((token_S, places_S - token_S * pre_BC.shape[1] + first, pre_BC.view(-1)[places_S]))
    token_S, latent_S, code_S = (torch.cat(column) for column in zip(*parts, strict=True))
    order_S = token_S.argsort(stable=True)  # chunks ascend, so latents do within a token
    return Selection(token_S[order_S], latent_S[order_S]), code_S[order_S]


def _places_above(scores_P: Tensor, bound: float, mask_P: Tensor) -> Tensor:
    """Where scores exceed a bound, ascending, int64; `mask_P` is room for one flag each."""
    if scores_P.device.type != "cpu":
        return torch.gt(scores_P, bound, out=mask_P).nonzero().squeeze(1)
    values_P = scores_P.numpy()  # NumPy takes a third of torch's time
    return torch.from_numpy(np.flatnonzero(np.greater(values_P, values_P.dtype.type(bound), out=mask_P.numpy())))
