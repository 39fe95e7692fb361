"""The encoder product, a chunk of latents at a time, so that the (B, L) pre-activations never exist whole.

    pre = x W_enc^T + b_enc,  before the ReLU: only positive codes are ever looked at.

A chunk has as many latents as fit `CHUNK_BYTES` (at least one): what the selection reads is then still in the cache,
and the memory of a step grows with B * W, not with B * L.

Shapes: B tokens, M models, D width, W = M * D, L latents, C latents of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.crosscoder import Crosscoder

# A GPU wants products that fill it; a CPU, chunks that stay in a cache, and few enough of them.
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 26}


@dataclass
class Operands:
    """The weights of a rank's latents as the products of a step read them, and s (L,), which ranks codes.

    W_enc, b_enc and W_dec have the dtype that their product is computed in; b_dec and s that of the master weights.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    scale_L: Tensor

    @classmethod
    def of(cls, crosscoder: Crosscoder) -> Operands:
        """The master weights themselves, as they are now."""
        W_enc, b_enc = crosscoder.W_enc.detach(), crosscoder.b_enc.detach()
        W_dec, b_dec = crosscoder.W_dec.detach(), crosscoder.b_dec.detach()
        return cls(W_enc, b_enc, W_dec, b_dec, crosscoder.latent_scale())


class Copies:
    """The operands of weights that lie here as plain tensors; to be refreshed whenever the weights change.

    Where a product is computed in another dtype than the master weights have, its operand is a copy of them; where not,
    it is the weight itself. `norms_LM` are the decoder norms, which s is made of.
    """

    def __init__(
        self, crosscoder: Crosscoder, encoder_dtype: torch.dtype | None = None, decoder_dtype: torch.dtype | None = None
    ):
        self._crosscoder = crosscoder
        self.norms_LM = crosscoder.W_dec.detach().new_empty(crosscoder.num_latents, crosscoder.num_models)
        self.operands = Operands(
            _operand(crosscoder.W_enc, encoder_dtype),
            _operand(crosscoder.b_enc, encoder_dtype),
            _operand(crosscoder.W_dec, decoder_dtype),
            crosscoder.b_dec.detach(),
            torch.empty_like(crosscoder.b_enc.detach()),
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read all of the weights again."""
        self.norms_LM.copy_(self._crosscoder.decoder_norms())
        for weight, operand in (
            (self._crosscoder.W_enc, self.operands.W_enc),
            (self._crosscoder.W_dec, self.operands.W_dec),
        ):
            if operand.dtype != weight.dtype:
                operand.copy_(weight)
        self.refresh_small()

    @torch.no_grad()
    def refresh_small(self) -> None:
        """Read again what is small: all but the copies of W_enc and W_dec and the decoder norms."""
        self.operands.scale_L = self._crosscoder.latent_scale(self.norms_LM)
        if self.operands.b_enc.dtype != self._crosscoder.b_enc.dtype:
            self.operands.b_enc.copy_(self._crosscoder.b_enc)


def _operand(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight.detach() if dtype in (None, weight.dtype) else torch.empty_like(weight, dtype=dtype)


def chunk_latents(num_tokens: int, num_latents: int, element_size: int, device_type: str) -> int:
    """Latents C of a chunk whose (B, C) pre-activations take at most CHUNK_BYTES, and at least one."""
    return min(num_latents, max(1, CHUNK_BYTES[device_type] // (max(1, num_tokens) * element_size)))


def encoder_chunks(x_BW: Tensor, operands: Operands) -> Iterator[tuple[int, Tensor]]:
    """Chunks of pre, each as (its first latent, (B, C)), in ascending order; valid until the next is asked for.

    `x_BW` is scaled. The product and its result have the dtype of operands.W_enc.
    """
    weight_LW, bias_L = operands.W_enc, operands.b_enc
    x_BW, num_latents = x_BW.to(weight_LW.dtype), len(weight_LW)
    size = chunk_latents(len(x_BW), num_latents, weight_LW.element_size(), x_BW.device.type)
    buffer = x_BW.new_empty(len(x_BW) * size)
    for first in range(0, num_latents, size):
        rows_CW = weight_LW[first : first + size]
        pre_BC = buffer[: len(x_BW) * len(rows_CW)].view(len(x_BW), len(rows_CW))
        torch.addmm(bias_L[first : first + size], x_BW, rows_CW.T, out=pre_BC)
        yield first, pre_BC
