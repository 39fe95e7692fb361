"""The training step through sparse products: what dense autograd computes, without its products over silent latents.

Of k * B codes out of L * B only the kept ones are multiplied, forward and backward; what remains is one encoder product
without graph, in chunks of latents.

With P the (B, L) matrix of kept codes, Z the latents that may be dead, Q (B, Z) their AuxK codes (zero for those that
are not dead) and G, H the gradients of the two outputs:

    recons       = P W_dec + b_dec                      e_hat = Q W_dec[Z]
    dP           = (G W_dec^T) on the pattern of P      dQ    = (H W_dec[Z]^T) where Q > 0
    dW_dec       = P^T G, rows Z += Q^T H               db_dec = sum_t G
    dW_enc       = dP^T x, rows Z += dQ^T x             db_enc = sum_t dP, entries Z += sum_t dQ

The entries of P are sorted by latent once; dP, dW_dec and dW_enc all walk through them in that order, each latent's
entries summed one after another, so results do not depend on the timing of threads. No (S, W) temporary exists.
Equivalent slow form: `train.readable`.
Shapes: B tokens, M models, D width, W = M * D, L latents (of this rank), S selected codes, Z latents that may be dead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from extract.errors import BadInput
from train.batch_topk import Selection, TopScores
from train.crosscoder import Crosscoder
from train.encoder import CHUNK_BYTES, Operands, encoder_chunks
from train.placement import Share
from train.products import ByLatent, ByToken, Gradients, products_for


class Codes(NamedTuple):
    """Codes without graph: the kept entries of P, and Q for the latents `aux_Z` (indices, maybe none)."""

    selection: Selection
    code_S: Tensor
    aux_Z: Tensor
    aux_BZ: Tensor


def top_scores(
    share: Share,
    num_selected: int,
    num_tokens: int,
    device: torch.device,
    token_B: Tensor | None = None,
    fixed_size: bool | None = None,
) -> TopScores:
    """Will find the largest scores of all ranks' `num_tokens` tokens, given those of this rank, numbered `token_B`."""
    everyone = share.everyone
    return TopScores(
        min(num_selected, num_tokens * share.num_latents),
        num_tokens,
        share.num_latents,
        device,
        all_reduce=partial(everyone.sum, what="selection") if everyone.size > 1 else None,
        fixed_size=fixed_size,
        token_B=token_B,
        first_latent=share.first_latent,
    )


@torch.no_grad()
def add_scores(top: TopScores, x_BW: Tensor, operands: Operands, first_token: int = 0) -> None:
    """Encode scaled activations, the tokens of `top` from `first_token` on, and hand over their scores pre * s."""
    for first, pre_BC in encoder_chunks(x_BW, operands):
        top.add(pre_BC, operands.scale_L[first : first + pre_BC.shape[1]], first, first_token)


@torch.no_grad()
def auxk_codes(
    x_BW: Tensor, operands: Operands, candidate_Z: Tensor, dead_L: Tensor, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Q (B, Z): the codes of dead latents that are chosen, 0 elsewhere.

    `choose` makes of scaled codes (B, Z), -1 for latents that are not dead, the mask (B, Z) of the chosen ones.
    """
    rows_ZW, bias_Z, is_dead_Z = operands.W_enc[candidate_Z], operands.b_enc[candidate_Z], dead_L[candidate_Z]
    pre_BZ = torch.addmm(bias_Z, x_BW.to(rows_ZW.dtype), rows_ZW.T).relu_().to(x_BW.dtype)
    is_chosen_BZ = choose(torch.where(is_dead_Z, pre_BZ * operands.scale_L[candidate_Z], -1.0))
    return pre_BZ.mul_(is_chosen_BZ & is_dead_Z)


def reconstruct(
    crosscoder: Crosscoder,
    x_BW: Tensor,
    codes: Codes,
    operands: Operands,
    gradients: Gradients | None = None,
    with_bias: bool = True,
) -> tuple[Tensor, Tensor]:
    """(recons, e_hat), both (B, W), of known codes, with hand-written gradients for the four weights of `crosscoder`.

    With `gradients` these are written there, and autograd sees none. Without `with_bias` b_dec is left out and has the
    gradient zero: another rank, which decodes the same tokens from other latents, adds it.

    BadInput for master weights of a dtype or on a device that the products do not support.
    """
    _check_supported(operands.b_dec)
    weights = crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec
    return _SparseReconstruction.apply(x_BW, *weights, codes, operands, gradients, with_bias)


@torch.no_grad()
def decode(selection: Selection, code_S: Tensor, num_tokens: int, operands: Operands, with_bias: bool = True) -> Tensor:
    """recons (B, W) in the scaled space, without graph, of the codes of a selection.

    Equals `Crosscoder.reconstruct` of the dense codes (B, L) to rounding, without its products over silent latents.
    """
    b_dec = operands.b_dec if with_bias else torch.zeros_like(operands.b_dec)
    return products_for(b_dec).decode(ByToken.of(selection, code_S, num_tokens), operands.W_dec, b_dec)


class _SparseReconstruction(torch.autograd.Function):
    """(x, W_enc, b_enc, W_dec, b_dec) -> (recons, e_hat), both (B, W), for codes that are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BW: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        codes: Codes,
        operands: Operands,
        gradients: Gradients | None,
        with_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BW, *(() if gradients else (W_enc, b_enc, W_dec, b_dec)))
        ctx.codes, ctx.operands, ctx.gradients, ctx.with_bias = codes, operands, gradients, with_bias
        recons_BW = decode(codes.selection, codes.code_S, len(x_BW), operands, with_bias)
        return recons_BW, _matmul(codes.aux_BZ, operands.W_dec[codes.aux_Z])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_recons_BW: Tensor, grad_error_BW: Tensor) -> tuple[Tensor | None, ...]:
        x_BW, *weights = ctx.saved_tensors
        into = ctx.gradients or Gradients.like(*weights)
        codes, W_dec = ctx.codes, ctx.operands.W_dec
        entries = ByLatent.of(codes.selection, codes.code_S, len(W_dec))
        products_for(into.W_dec).gradients(entries, x_BW, grad_recons_BW.contiguous(), W_dec, into)
        if len(codes.aux_Z):
            _add_auxk_gradients(codes, x_BW, grad_error_BW, W_dec, into)
        _add_bias_gradient(grad_recons_BW, into, ctx.with_bias)
        returned = (None,) * 4 if ctx.gradients else into[:4]
        return None, *returned, None, None, None, None


def _add_auxk_gradients(codes: Codes, x_BW: Tensor, grad_BW: Tensor, W_dec: Tensor, into: Gradients) -> None:
    """Add the gradients of e_hat. The latents of a batch are distinct, so no two sums meet in a row."""
    grad_aux_BZ = torch.where(codes.aux_BZ > 0, _matmul(grad_BW, W_dec[codes.aux_Z].T), 0.0)
    into.W_enc.index_add_(0, codes.aux_Z, _matmul(grad_aux_BZ.T, x_BW.to(W_dec.dtype)))
    into.b_enc.index_add_(0, codes.aux_Z, grad_aux_BZ.sum(0))
    into.W_dec.index_add_(0, codes.aux_Z, _matmul(codes.aux_BZ.T, grad_BW.to(W_dec.dtype)))


def _add_bias_gradient(grad_BW: Tensor, into: Gradients, with_bias: bool) -> None:
    grad_b_dec = grad_BW.sum(0) if with_bias else torch.zeros_like(into.b_dec)
    into.b_dec.add_(grad_b_dec) if into.accumulate else into.b_dec.copy_(grad_b_dec)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the dtype of `right`, as the dtype of `left`."""
    return (left.to(right.dtype) @ right).to(left.dtype)


def _check_supported(weight: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.float64) or weight.device.type not in CHUNK_BYTES:
        raise BadInput(
            f"The sparse step takes float32 or float64 weights on {' or '.join(CHUNK_BYTES)}, and these are "
            f"{weight.dtype} on {weight.device}. Keep master weights in float32 (training.precision=bf16 makes "
            "products faster), or use training.step=readable."
        )
