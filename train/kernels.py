"""The sparse step on a GPU: Triton kernels for the products with codes, and for Adam over rows of weights.

    decode         recons_b = b_dec + sum of code * W_dec[latent] over the codes of token b
    gradients      dcode = <G[token], W_dec[latent]>, then for each latent, over its codes,
                   dW_dec = sum of code * G[token],  dW_enc = sum of dcode * x[token],  db_enc = sum of dcode
    adam_rows      Adam, the copy in lower precision and the decoder norms, while a row is at hand

Every program owns one block of one row of the result and adds up its terms in order: no atomics, the same bits each
time. Inputs may be bf16; sums are fp32. A row is cut into blocks of the power of two that wastes least of it, so that
widths such as 7168 = 7 * 1024 and 1152 = 9 * 128 cost what they are. The same functions in torch: `train.products`.

Shapes: B tokens, M models, D width, W = M * D, L latents, S codes, of which those of value 0 at the end are padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.batch_topk import Selection
from train.products import ByLatent, ByToken, Gradients

BLOCKS = (1024, 512, 256, 128, 64)
CODES_PER_PROGRAM = 8


def block_size(width: int) -> int:
    """The block that covers `width` with least waste; of equally good ones the largest."""
    return min(BLOCKS, key=lambda block: (triton.cdiv(width, block) * block, -block))


def decode(entries: ByToken, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """P W_dec + b_dec, (B, W), in the dtype of b_dec; see `train.products.Products`."""
    num_tokens, width = len(entries.start) - 1, W_dec.shape[1]
    recons_BW = b_dec.new_empty(num_tokens, width)
    block, start = block_size(width), _without_padding(entries.start, entries.code)
    _decode[num_tokens, triton.cdiv(width, block)](
        start, entries.latent, entries.code, W_dec, b_dec, recons_BW, width, BLOCK=block
    )
    return recons_BW


def gradients(entries: ByLatent, x_BW: Tensor, grad_BW: Tensor, W_dec: Tensor, into: Gradients) -> None:
    """Write the gradients of W_enc, b_enc and W_dec; see `train.products.Products`."""
    (num_latents, width), num_codes = W_dec.shape, len(entries.code)
    x_BW, grad_BW = x_BW.to(W_dec.dtype), grad_BW.to(W_dec.dtype)
    grad_code_S = torch.empty_like(entries.code)
    block, start = block_size(width), _without_padding(entries.start, entries.code)
    if num_codes:
        _code_gradients[(triton.cdiv(num_codes, CODES_PER_PROGRAM),)](
            entries.latent, entries.token, grad_BW, W_dec, grad_code_S, num_codes, width, CODES_PER_PROGRAM, BLOCK=block
        )
    _row_gradients[num_latents, triton.cdiv(width, block)](
        start,
        entries.token,
        entries.code,
        grad_code_S,
        x_BW,
        grad_BW,
        into.W_enc,
        into.b_enc,
        into.W_dec,
        width,
        ACCUMULATE=into.accumulate,
        BLOCK=block,
    )


def adam_rows(
    weight_LW: Tensor,
    gradient_LW: Tensor,
    first_LW: Tensor,
    second_LW: Tensor,
    rates_4: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    copy_LW: Tensor,
    norms_LM: Tensor | None = None,
) -> None:
    """One update of Adam in place, and from the new rows `copy_LW` in its dtype and, if wanted, `norms_LM`, the norms
    per model.

    `rates_4` on the device: lr / (1 - b1^t), 1 / sqrt(1 - b2^t), the factor of the gradient, and 1 if nothing may
    change. `copy_LW` may be the weight itself.
    """
    num_models = 1 if norms_LM is None else norms_LM.shape[1]
    d_model = weight_LW.shape[1] // num_models
    block = block_size(d_model)
    _adam_rows[len(weight_LW), num_models](
        weight_LW,
        gradient_LW,
        first_LW,
        second_LW,
        rates_4,
        copy_LW,
        norms_LM,
        *betas,
        epsilon,
        d_model,
        NUM_BLOCKS=triton.cdiv(d_model, block),
        BLOCK=block,
    )


def disagreement(device: torch.device) -> str | None:
    """How the kernels differ from dense products on a small case; None if they do not."""
    difference = largest_difference(device)
    return None if difference < 1e-4 else f"the kernels differ from dense products by {difference:.1g}"


def largest_difference(device: torch.device) -> float:
    """Largest difference between the kernels and dense products in float64 on a small decode and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"acts": (5, 7), "x": (5, 192), "grad": (5, 192), "W_dec": (7, 192), "b_dec": (192,)}
    exact = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    acts_BL, x_BW, grad_BW, W_dec = exact["acts"].relu_(), exact["x"], exact["grad"], exact["W_dec"]
    selection = Selection(*acts_BL.nonzero(as_tuple=True))
    grad_acts_BL = grad_BW @ W_dec.T * (acts_BL > 0)
    expected = (
        acts_BL @ W_dec + exact["b_dec"],
        grad_acts_BL.T @ x_BW,
        grad_acts_BL.sum(0),
        acts_BL.T @ grad_BW,
    )
    there = {name: tensor.float().to(device) for name, tensor in exact.items()}
    selection = Selection(*(part.to(device) for part in selection))
    code_S = there["acts"][selection]
    recons_BW = decode(ByToken.of(selection, code_S, 5), there["W_dec"], there["b_dec"])
    into = Gradients.like(there["W_dec"], there["W_dec"][:, 0], there["W_dec"], there["b_dec"])
    gradients(ByLatent.of(selection, code_S, 7), there["x"], there["grad"], there["W_dec"], into)
    found = (recons_BW, *into[:3])
    return max((a - b.cpu()).abs().max().item() for a, b in zip(expected, found, strict=True))


def _without_padding(start: Tensor, code_S: Tensor) -> Tensor:
    """Row starts of the codes proper: padding stands at the end, in the last row, and may be long."""
    return start.clamp(max=(code_S > 0).sum())


@triton.jit
def _decode(start_ptr, latent_ptr, code_ptr, W_dec_ptr, b_dec_ptr, recons_ptr, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(b_dec_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for s in range(tl.load(start_ptr + token), tl.load(start_ptr + token + 1)):
        row = tl.load(latent_ptr + s).to(tl.int64) * width
        total += tl.load(code_ptr + s) * tl.load(W_dec_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(recons_ptr + token * width + column, total, mask=inside)


@triton.jit
def _code_gradients(
    latent_ptr, token_ptr, grad_ptr, W_dec_ptr, grad_code_ptr, num_codes, width, NUM: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0) * NUM
    for s in range(first, tl.minimum(first + NUM, num_codes)):
        latent_row = tl.load(latent_ptr + s).to(tl.int64) * width
        token_row = tl.load(token_ptr + s).to(tl.int64) * width
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for begin in range(0, width, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < width
            weight = tl.load(W_dec_ptr + latent_row + column, mask=inside, other=0.0).to(tl.float32)
            products += weight * tl.load(grad_ptr + token_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_code_ptr + s, tl.sum(products, 0))


@triton.jit
def _row_gradients(
    start_ptr,
    token_ptr,
    code_ptr,
    grad_code_ptr,
    x_ptr,
    grad_ptr,
    grad_W_enc_ptr,
    grad_b_enc_ptr,
    grad_W_dec_ptr,
    width,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = latent * width + column
    enc, dec, bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((), tl.float32)
    for s in range(tl.load(start_ptr + latent), tl.load(start_ptr + latent + 1)):
        row = tl.load(token_ptr + s).to(tl.int64) * width
        grad_code = tl.load(grad_code_ptr + s)
        dec += tl.load(code_ptr + s) * tl.load(grad_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        enc += grad_code * tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        bias += grad_code
    if ACCUMULATE:
        enc += tl.load(grad_W_enc_ptr + place, mask=inside, other=0.0)
        dec += tl.load(grad_W_dec_ptr + place, mask=inside, other=0.0)
    tl.store(grad_W_enc_ptr + place, enc, mask=inside)
    tl.store(grad_W_dec_ptr + place, dec, mask=inside)
    if tl.program_id(1) == 0:
        if ACCUMULATE:
            bias += tl.load(grad_b_enc_ptr + latent)
        tl.store(grad_b_enc_ptr + latent, bias)


@triton.jit
def _adam_rows(
    weight_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    rates_ptr,
    copy_ptr,
    norms_ptr,
    beta1,
    beta2,
    epsilon,
    d_model,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    latent_model = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if tl.load(rates_ptr + 3) == 0:
        rate, root, factor = tl.load(rates_ptr), tl.load(rates_ptr + 1), tl.load(rates_ptr + 2)
        squares = tl.zeros((BLOCK,), tl.float32)
        for block in range(NUM_BLOCKS):
            column = block * BLOCK + tl.arange(0, BLOCK)
            inside = column < d_model
            place = latent_model * d_model + column
            gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0) * factor
            first = beta1 * tl.load(first_ptr + place, mask=inside, other=0.0) + (1 - beta1) * gradient
            second = beta2 * tl.load(second_ptr + place, mask=inside, other=0.0) + (1 - beta2) * gradient * gradient
            weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
            weight -= rate * first / (tl.sqrt(second) * root + epsilon)
            tl.store(weight_ptr + place, weight, mask=inside)
            tl.store(first_ptr + place, first, mask=inside)
            tl.store(second_ptr + place, second, mask=inside)
            tl.store(copy_ptr + place, weight, mask=inside)
            squares += weight * weight
        if norms_ptr is not None:
            tl.store(norms_ptr + latent_model, tl.sqrt(tl.sum(squares, 0)))
