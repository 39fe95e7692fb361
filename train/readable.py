"""The training step in dense autograd, and the reference of every other form.

    pre = ReLU(x W_enc^T + b_enc);  acts = pre at the selection, else 0;  recons = acts W_dec + b_dec
    e_hat = acts of the chosen dead latents times their rows of W_dec, without bias

`precision`, where one is given, is the dtype of the operands and of the products; sums with a bias are wider.
Shapes: B tokens, M models, D width, W = M * D, L latents (of this rank), S selected codes, Z dead latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from extract.errors import BadInput
from train.batch_topk import Selection
from train.crosscoder import Crosscoder

TOPK_LIMIT = 2**31 - 1  # elements that torch.topk can rank


def dense_codes(crosscoder: Crosscoder, x_BW: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """pre (B, L) of scaled activations."""
    return _linear(x_BW, crosscoder.W_enc.T, crosscoder.b_enc, precision).relu()


def dense_reconstruction(
    crosscoder: Crosscoder, pre_BL: Tensor, selection: Selection, b_dec: Tensor, precision: torch.dtype | None = None
) -> Tensor:
    """recons (B, W) from the selected codes."""
    acts_BL = torch.zeros_like(pre_BL).index_put(tuple(selection), pre_BL[selection])
    return _linear(acts_BL, crosscoder.W_dec, b_dec, precision)


def dense_auxk(
    crosscoder: Crosscoder, pre_BZ: Tensor, chosen_BZ: Tensor, dead_Z: Tensor, precision: torch.dtype | None = None
) -> Tensor:
    """e_hat (B, W) from the chosen codes of the latents `dead_Z` (indices)."""
    return _linear(pre_BZ * chosen_BZ, crosscoder.W_dec[dead_Z], None, precision)


def largest(score_BL: Tensor, num_selected: int) -> Selection:
    """The `num_selected` largest positive scores: those above the cut that torch.topk finds, then those equal to it, in
    the order of (token, latent). The reference of `train.batch_topk`, which shares nothing with it.

    Raises FloatingPointError for scores that are not finite.
    """
    if score_BL.numel() > TOPK_LIMIT:
        raise BadInput(
            f"training.step=readable cannot rank {score_BL.shape[0]} tokens x {score_BL.shape[1]} latents: torch.topk "
            f"takes {TOPK_LIMIT} scores. Use training.step=sparse."
        )
    flat = score_BL.flatten()
    if not flat.isfinite().all():
        raise FloatingPointError("Scores are not finite: the activations or the weights hold nan or inf.")
    num_selected = min(num_selected, len(flat))
    cut = flat.topk(num_selected, sorted=False).values.min().clamp(min=0.0) if num_selected > 0 else flat.new_tensor(0)
    above = (flat > cut).nonzero().squeeze(1)[:num_selected]
    equal = ((flat == cut) & (flat > 0)).nonzero().squeeze(1)[: num_selected - len(above)]
    position_S = torch.cat([above, equal]).sort().values
    return Selection(position_S // score_BL.shape[1], position_S % score_BL.shape[1])


def _linear(x_BK: Tensor, weight_KN: Tensor, bias_N: Tensor | None, precision: torch.dtype | None) -> Tensor:
    """x W + b; with operands and product in `precision`, and the bias added in the dtype of x, if one is given."""
    if precision is not None and precision != x_BK.dtype:
        product_BN = (x_BK.to(precision) @ weight_KN.to(precision)).to(x_BK.dtype)
        return product_BN if bias_N is None else product_BN + bias_N
    return x_BK @ weight_KN if bias_N is None else torch.addmm(bias_N, x_BK, weight_KN)
