"""Which latents belong to one model: Delta-norm, latent scaling and the owner that follows from both.

Shapes: B tokens, M models, D width, L latents, n firing (token, latent) pairs of a batch. Everything here lives in the
scaled space of the crosscoder; f are inference codes. Pairs of models index the last two axes, focus first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.columns import owner_name
from analysis.config import OwnerConfig
from train.products import row_starts, sparse_rows

# Values that one temporary may hold (256 MB in float32).
CHUNK_VALUES = 2**26


@dataclass(frozen=True)
class Codes:
    """The nonzero codes of a batch, sorted by token and then by latent."""

    token_n: Tensor
    latent_n: Tensor
    value_n: Tensor
    num_tokens: int
    num_latents: int

    @classmethod
    def from_dense(cls, acts_BL: Tensor) -> "Codes":
        """The nonzero entries of (B, L) codes."""
        token_n, latent_n = acts_BL.nonzero(as_tuple=True)
        return cls(token_n, latent_n, acts_BL[token_n, latent_n], *acts_BL.shape)

    def decode(self, weight_LK: Tensor) -> Tensor:
        """The sparse product acts (B, L) @ weight (L, K), without a (B, L) tensor."""
        starts = row_starts(self.token_n, self.num_tokens)
        return sparse_rows(starts, self.latent_n, self.value_n, self.num_latents) @ weight_LK


class ScalingSums:
    """The sums of latent scaling, gathered over batches in float64; work grows with the firing latents only.

        num_active (L,)         tokens on which the latent fires
        sum_f, sum_f2 (L,)      sum_t f_j and sum_t f_j^2
        max_f (L,)              max_t f_j, 0 for a latent that never fired
        error (L, M, M)         [j, a, m] = sum_t f_j <d_j^a, x_m - recons_m>      a: the focus model
        recons (L, M, M)        [j, a, m] = sum_t f_j <d_j^a, recons_m>

    Per batch the inner sums sum_t f_j y_m are one sparse product acts^T y, taken for the latents that fire.
    """

    def __init__(self, num_latents: int, num_models: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_tokens = 0
        self.num_active = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.sum_f, self.sum_f2, self.max_f = zeros(num_latents), zeros(num_latents), zeros(num_latents)
        self.error = zeros(num_latents, num_models, num_models)
        self.recons = zeros(num_latents, num_models, num_models)

    def add(self, codes: Codes, x_BMD: Tensor, recons_BMD: Tensor, W_dec_LMD: Tensor) -> None:
        """Adds one batch: its codes, scaled activations and scaled reconstructions (bias and all latents included)."""
        value_n = codes.value_n.double()
        self.num_tokens += codes.num_tokens
        self.num_active += torch.bincount(codes.latent_n, minlength=codes.num_latents)
        self.sum_f.index_add_(0, codes.latent_n, value_n)
        self.sum_f2.index_add_(0, codes.latent_n, value_n.square())
        self.max_f.scatter_reduce_(0, codes.latent_n, value_n, "amax")
        targets_B2MD = torch.stack([x_BMD - recons_BMD, recons_BMD], dim=1)
        for latent_u, sums_u2MD in _sums_by_latent(codes, targets_B2MD):
            dots_u2MM = torch.einsum("uad,ukmd->ukam", W_dec_LMD[latent_u], sums_u2MD).double()
            self.error.index_add_(0, latent_u, dots_u2MM[:, 0])
            self.recons.index_add_(0, latent_u, dots_u2MM[:, 1])


def _sums_by_latent(codes: Codes, targets_B2MD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (latents (u,), sum_t f_j target_t (u, 2, M, D)) over the latents that fire."""
    order_n = codes.latent_n.argsort(stable=True)
    latent_n, token_n, value_n = codes.latent_n[order_n], codes.token_n[order_n], codes.value_n[order_n]
    latent_U, counts_U = torch.unique_consecutive(latent_n, return_counts=True)
    flat_BK = targets_B2MD.flatten(1)
    rows, begin = max(1, CHUNK_VALUES // flat_BK.shape[1]), 0
    for latent_u, counts_u in zip(latent_U.split(rows), counts_U.split(rows), strict=True):
        end = begin + int(counts_u.sum())
        starts = torch.nn.functional.pad(counts_u.cumsum(0), (1, 0))
        acts_uB = sparse_rows(starts, token_n[begin:end], value_n[begin:end], codes.num_tokens)
        yield latent_u, (acts_uB @ flat_BK).unflatten(1, targets_B2MD.shape[1:])
        begin = end


def decoder_gram(W_dec_LMD: Tensor) -> Tensor:
    """<d_j^a, d_j^m> for all pairs of models (L, M, M), float64, on the CPU."""
    rows = max(1, CHUNK_VALUES // W_dec_LMD[0].numel())
    chunks = (chunk.detach().double() for chunk in W_dec_LMD.split(rows))
    return torch.cat([torch.einsum("jad,jmd->jam", chunk, chunk).cpu() for chunk in chunks])


def nu(sums: ScalingSums, gram_LMM: Tensor) -> tuple[Tensor, Tensor]:
    """nu_error and nu_reconstruction of all ordered pairs, each (L, M, M), [j, focus, other], float64.

    beta_m(Y) = <d_j, sum_t f_j y_m> / (||d_j||^2 sum_t f_j^2) is the least-squares factor by which the focus model's
    latent f_j d_j explains the target y_m; nu = beta_other / beta_focus.

        nu_error           y_m = x_m - (recons_m - f_j d_j^m)     high: `other` uses it as well (complete shrinkage)
        nu_reconstruction  y_m = recons_m                         high: other latents rebuild it (latent decoupling)

    NaN for a latent that never fired, a focus whose row is zero, and beta_focus = 0. Source: arXiv 2504.02922; the sums
    give the same numbers as solving one regression per latent, model and target.
    """
    norm2_LM = gram_LMM.diagonal(dim1=1, dim2=2)
    scale_LM1 = (norm2_LM * sums.sum_f2.cpu()[:, None])[:, :, None]
    # <d_j^m, d_j>/||d_j||^2: the own contribution that the error target adds back, with m's own row.
    own_LMM = gram_LMM / norm2_LM[:, :, None]
    return _ratio_to_focus(sums.error.cpu() / scale_LM1 + own_LMM), _ratio_to_focus(sums.recons.cpu() / scale_LM1)


def _ratio_to_focus(beta_LMM: Tensor) -> Tensor:
    focus_LM1 = beta_LMM.diagonal(dim1=1, dim2=2)[:, :, None]
    nu_LMM = beta_LMM / focus_LM1
    return torch.where(nu_LMM.isfinite() & (focus_LM1 != 0), nu_LMM, torch.nan)


def delta_norm_tags(
    delta_norm_L: np.ndarray, fired_L: np.ndarray, names: tuple[str, str], owner: OwnerConfig
) -> np.ndarray:
    """`<first>-only`, `<second>-only`, `shared` or `other` by the Delta-norm of one pair; `dead` if it never fired."""
    conditions = [
        ~fired_L,
        delta_norm_L < owner.delta_norm_low,
        delta_norm_L > owner.delta_norm_high,
        (delta_norm_L >= owner.shared_low) & (delta_norm_L <= owner.shared_high),
    ]
    return np.select(conditions, ["dead", f"{names[0]}-only", f"{names[1]}-only", "shared"], "other")


def holders(delta_norm_LMM: np.ndarray, dedicated_owner_L: np.ndarray, owner: OwnerConfig) -> np.ndarray:
    """(L, M): the models that the weights alone allow to own latent j, all False if there is no such set of models.

    Of an ordinary latent, every pair within the set has a Delta-norm in the shared range, and every model of the set
    one beyond the thresholds towards every model outside; how these compare among each other does not matter. At most
    one set fulfils that. The Delta-norm of a dedicated latent is 0 or 1 by construction and proves nothing, so the
    model that it is dedicated to holds it.
    """
    num_models = delta_norm_LMM.shape[1]
    upper = np.triu(np.ones((num_models, num_models), dtype=bool), 1)
    shared_LMM = upper & (delta_norm_LMM >= owner.shared_low) & (delta_norm_LMM <= owner.shared_high)
    second_LMM = upper & (delta_norm_LMM > owner.delta_norm_high)
    # [j, a, b]: a has the latent and b lacks it. The set is those that lack it compared with nobody.
    only_LMM = (upper & (delta_norm_LMM < owner.delta_norm_low)) | second_LMM.swapaxes(1, 2)
    held_LM = np.invert(only_LMM.any(axis=1))
    alike_LMM = shared_LMM | shared_LMM.swapaxes(1, 2) | np.eye(num_models, dtype=bool)
    agrees_LMM = np.where(held_LM[:, None, :], alike_LMM, only_LMM)
    agreed_L11 = np.all(agrees_LMM | ~held_LM[:, :, None], axis=(1, 2), keepdims=True)
    dedicated_L1 = dedicated_owner_L[:, None]
    return np.where(dedicated_L1 >= 0, dedicated_L1 == np.arange(num_models), held_LM & agreed_L11[:, :, 0])


def owners(
    delta_norm_LMM: np.ndarray,
    nu_error_LMM: np.ndarray,
    nu_reconstruction_LMM: np.ndarray,
    fired_L: np.ndarray,
    dedicated_owner_L: np.ndarray,
    models: list[str],
    owner: OwnerConfig,
) -> np.ndarray:
    """The owner of every latent: the set of models that share it and that the others lack (`columns.owner_name`).

    dead    it never fired
    a, a+b  its `holders`, if with each of them as focus |nu_error| and |nu_reconstruction| are small towards every
            model outside
    shared  all models hold it
    other   the rest; a nu that is NaN passes no threshold
    """
    held_LM = holders(delta_norm_LMM, dedicated_owner_L, owner)
    max_reconstruction_L = np.where(
        dedicated_owner_L < 0, owner.max_nu_reconstruction, owner.max_nu_reconstruction_dedicated
    )
    exclusive_LMM = (np.abs(nu_error_LMM) < owner.max_nu_error) & (
        np.abs(nu_reconstruction_LMM) < max_reconstruction_L[:, None, None]
    )
    asked_LMM = held_LM[:, :, None] & ~held_LM[:, None, :]
    held_LM &= (exclusive_LMM | ~asked_LMM).all(axis=(1, 2))[:, None]
    sets_SM, set_L = np.unique(held_LM, axis=0, return_inverse=True)
    names_S = np.array([owner_name([models[m] for m in np.flatnonzero(set_M)], models) for set_M in sets_SM])
    return np.where(fired_L, names_S[set_L.reshape(-1)], "dead")
