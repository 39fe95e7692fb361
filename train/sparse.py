"""The training step through sparse products: what dense autograd computes, without its products over silent latents.

Of k * B codes out of L * B only the kept ones are multiplied, forward and backward; what remains is one encoder product
without graph.

With P the (B, L) matrix of kept codes, Z the dead latents, Q (B, Z) their AuxK codes and G, H the
gradients of the two outputs:

    recons       = P W_dec + b_dec                      e_hat = Q W_dec[Z]
    dP           = (G W_dec^T) on the pattern of P      dQ    = (H W_dec[Z]^T) where Q > 0
    dW_dec       = P^T G, rows Z += Q^T H               db_dec = sum_t G
    dW_enc       = dP^T x, rows Z += dQ^T x             db_enc = sum_t dP, entries Z += sum_t dQ

No (S, W) temporary exists: torch.sparse multiplies row by row. Equivalent slow form: `train.losses.readable_forward`.
Shapes: B tokens, M models, D width, W = M * D, L latents, S selected codes, Z dead latents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.batch_topk import Selection, select
from train.crosscoder import Crosscoder
from train.losses import Forward, auxk_mask


class Codes(NamedTuple):
    """Codes without graph: the kept entries of P and, for the dead latents `dead_Z` (indices, maybe none), Q."""

    selection: Selection
    code_S: Tensor
    dead_Z: Tensor
    aux_BZ: Tensor


def sparse_forward(crosscoder: Crosscoder, x_BMD: Tensor, num_selected: int, dead_L: Tensor) -> Forward:
    """The training step with hand-written gradients; arguments and result as in `train.losses.readable_forward`."""
    with torch.no_grad():
        codes, score_S = _codes(crosscoder, x_BMD, num_selected, dead_L)
    weights = crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec
    recons_BW, error_recons_BW = _SparseReconstruction.apply(x_BMD.flatten(1), *weights, codes)
    error_recons_BMD = error_recons_BW.view_as(x_BMD) if len(codes.dead_Z) else None
    return Forward(recons_BW.view_as(x_BMD), error_recons_BMD, codes.selection, score_S)


@torch.no_grad()
def sparse_reconstruction(crosscoder: Crosscoder, selection: Selection, code_S: Tensor, num_tokens: int) -> Tensor:
    """recons (B, M, D) in the scaled space, without graph, of the codes of a selection.

    Equals `Crosscoder.reconstruct` of the dense codes (B, L) to rounding, without its products over silent latents.
    """
    acts_BL = _csr(selection.token, selection.latent, code_S, (num_tokens, crosscoder.num_latents))
    recons_BW = _product(acts_BL, crosscoder.W_dec).add_(crosscoder.b_dec)
    return recons_BW.view(-1, crosscoder.num_models, crosscoder.d_model)


def _codes(crosscoder: Crosscoder, x_BMD: Tensor, num_selected: int, dead_L: Tensor) -> tuple[Codes, Tensor]:
    """The codes of a batch and the scaled codes (S,) of its selection."""
    pre_BL, scale_L = crosscoder.pre_activations(x_BMD), crosscoder.latent_scale()
    score_BL = pre_BL * scale_L
    selection = select(score_BL, num_selected)
    if crosscoder.config.auxk_alpha == 0:
        dead_L = torch.zeros_like(dead_L)
    dead_Z = dead_L.nonzero().squeeze(1)
    aux_BZ = pre_BL[:, dead_Z]
    if len(dead_Z):
        aux_BZ *= auxk_mask(aux_BZ * scale_L[dead_Z], crosscoder.d_model)
    return Codes(selection, pre_BL[selection], dead_Z, aux_BZ), score_BL[selection]


class _SparseReconstruction(torch.autograd.Function):
    """(x, W_enc, b_enc, W_dec, b_dec) -> (recons, e_hat), both (B, W), for codes that are already known."""

    @staticmethod
    def forward(
        ctx: Any, x_BW: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, codes: Codes
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BW, W_dec, *codes.selection, codes.code_S, codes.dead_Z, codes.aux_BZ)
        acts_BL = _csr(codes.selection.token, codes.selection.latent, codes.code_S, (len(x_BW), len(W_enc)))
        return _product(acts_BL, W_dec).add_(b_dec), codes.aux_BZ @ W_dec[codes.dead_Z]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_recons_BW, grad_error_BW = (gradient.contiguous() for gradient in output_gradients)
        x_BW, W_dec, token_S, latent_S, code_S, dead_Z, aux_BZ = ctx.saved_tensors
        shape = len(x_BW), len(W_dec)
        pattern_BL = _csr(token_S, latent_S, torch.zeros_like(code_S), shape)
        grad_code_S = torch.sparse.sampled_addmm(pattern_BL, grad_recons_BW, W_dec.T, beta=0.0).values()
        by_latent_S = latent_S.argsort(stable=True)
        grad_W_enc = _product(_transposed(token_S, latent_S, grad_code_S, by_latent_S, shape), x_BW)
        grad_W_dec = _product(_transposed(token_S, latent_S, code_S, by_latent_S, shape), grad_recons_BW)
        grad_b_enc = torch.zeros_like(W_dec[:, 0]).index_add_(0, latent_S, grad_code_S)
        if len(dead_Z):
            grad_aux_BZ = torch.where(aux_BZ > 0, grad_error_BW @ W_dec[dead_Z].T, 0.0)
            grad_W_enc[dead_Z] += grad_aux_BZ.T @ x_BW
            grad_b_enc[dead_Z] += grad_aux_BZ.sum(0)
            grad_W_dec[dead_Z] += aux_BZ.T @ grad_error_BW
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_recons_BW.sum(0), None


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    """sparse @ dense in a third of the time that `@` takes, which fills an operand with zeros and copies the result."""
    result = dense.new_empty(sparse.shape[0], dense.shape[1])
    return torch.addmm(result, sparse, dense, beta=0, out=result)


def _transposed(
    token_S: Tensor, latent_S: Tensor, value_S: Tensor, by_latent_S: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The (L, B) transpose of a matrix whose entries are sorted by token: `by_latent_S` sorts them by latent."""
    return _csr(latent_S[by_latent_S], token_S[by_latent_S], value_S[by_latent_S], (shape[1], shape[0]))


def _csr(row_S: Tensor, column_S: Tensor, value_S: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sparse matrix from entries sorted by row."""
    return sparse_rows(torch.bincount(row_S, minlength=shape[0]), column_S, value_S, shape[1])


def sparse_rows(count_R: Tensor, column_S: Tensor, value_S: Tensor, num_columns: int) -> Tensor:
    """Sparse (R, num_columns) matrix from entries sorted by row, `count_R` in each.

    Its indices have 32 bits, which MKL and cuSPARSE take as they are.
    """
    start = torch.nn.functional.pad(count_R.cumsum(0), (1, 0)).int()
    return torch.sparse_csr_tensor(start, column_S.int(), value_S, (len(count_R), num_columns), check_invariants=False)
