"""Latent scaling in one pass: to how much of what a latent does for one model another model lends itself.

Shapes: B tokens, M models, D width, L latents, G groups of documents; u rows, the (group, latent) pairs of a batch.
Everything here lives in the scaled space of the crosscoder; f are inference codes. Pairs of models index the last two
axes, focus first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from analysis.firings.firings import Codes

# Values that one temporary may hold: few that a CPU's cache still holds when they are multiplied, many for a GPU.
CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**25}
# Values of a target that are summed at a time: what the tokens of a batch have in a few columns stays in a core's
# cache, where each of many latents finds it; a GPU takes all columns.
TILE_VALUES = {"cpu": 2**18, "cuda": sys.maxsize}
# What is done beside with the sums of rows: their latents (u,), 0 for the error and 1 for the reconstruction, and
# sum_t f_j target_t (u, M, D).
Watch = Callable[[Tensor, int, Tensor], None]


class ScalingSums:
    """The sums of latent scaling by group of documents, gathered over batches in float64.

        sum_f2 (G, L)           sum_t f_j^2
        error  (G, L, M, M)     [g, j, a, m] = sum_t f_j <d_j^a, x_m - recons_m>      a: the focus model
        recons (G, L, M, M)     [g, j, a, m] = sum_t f_j <d_j^a, recons_m>

    Per batch the inner sums sum_t f_j y_m are taken for the latents that fire, in an order that does not depend on the
    timing of threads.

    By group, because intervals need sums of parts that can be resampled. Sums by document of the latents that a model
    may own would be exact, but their number has no bound: 7,000 latents that fire in a fifth of 400,000 documents are
    40 GB. Groups of all latents are 8 * G * L * (1 + 2 M^2) bytes: at L = 114,688, M = 2 and G = 64, 528 MB.
    """

    def __init__(
        self, num_latents: int, num_models: int, num_groups: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.num_groups, self._shape = num_groups, (num_groups, num_latents, num_models, num_models)
        width = 1 + 2 * num_models**2
        self.sums_RK = torch.zeros(num_groups * num_latents, width, dtype=torch.float64, device=device)

    @property
    def by_group(self) -> tuple[Tensor, Tensor, Tensor]:
        """sum_f2, error and recons."""
        sums_GLK = self.sums_RK.unflatten(0, self._shape[:2])
        sum_f2, error, recons = sums_GLK.split([1, self._shape[2] ** 2, self._shape[2] ** 2], dim=2)
        return sum_f2[:, :, 0], error.unflatten(2, self._shape[2:]), recons.unflatten(2, self._shape[2:])

    def total(self) -> Tensor:
        """(L, 1 + 2 M^2): the sums over all groups, on the CPU; see `nu`."""
        return self.sums_RK.unflatten(0, self._shape[:2]).sum(0).cpu()

    def add(
        self, codes: Codes, error_BMD: Tensor, recons_BMD: Tensor, W_dec_LMD: Tensor, watch: Watch | None = None
    ) -> None:
        """Adds one batch: its codes, scaled activations less their reconstructions, and these, bias and all latents
        included.
        """
        squares_u = torch.segment_reduce(codes.value_n.double().square(), "sum", offsets=codes.start_u1)
        self.sums_RK[:, 0].index_add_(0, codes.row_u, squares_u)
        num_models = error_BMD.shape[1]
        size = max(1, CHUNK_VALUES[error_BMD.device.type] // error_BMD[0].numel())
        targets = [_tiles(target_BMD.flatten(1)) for target_BMD in (error_BMD, recons_BMD)]
        for first in range(0, len(codes.row_u), size):
            rows = slice(first, first + size)
            latent_u = codes.latent_u[rows]
            focus_uDM = W_dec_LMD.index_select(0, latent_u).transpose(1, 2)
            for target, tiles in enumerate(targets):
                sums_uMD = _sums_of(codes, rows, tiles).unflatten(1, (num_models, -1))
                dots_uMM = torch.bmm(sums_uMD, focus_uDM).transpose(1, 2)  # [u, focus, model]
                columns = slice(1 + target * num_models**2, 1 + (target + 1) * num_models**2)
                self.sums_RK[:, columns].index_add_(0, codes.row_u[rows], dots_uMM.flatten(1).double())
                if watch is not None:
                    watch(latent_u, target, sums_uMD)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums_RK.cpu().numpy()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on after `arrays` of the same stream."""
        self.sums_RK.copy_(torch.from_numpy(arrays["sums"]))


def _tiles(target_BK: Tensor) -> list[Tensor]:
    """The columns in parts of about TILE_VALUES, each in memory of its own; by 16, as vector instructions take them."""
    columns = TILE_VALUES[target_BK.device.type] // len(target_BK) // 16 * 16
    return [tile.contiguous() for tile in target_BK.split(max(16, columns), dim=1)]


def _sums_of(codes: Codes, rows: slice, tiles: list[Tensor]) -> Tensor:
    """sum_t f_j target_t (u, K) of some rows; `tiles` are those of the target."""
    start_u1 = codes.start_u1[rows.start : rows.stop + 1]
    begin, end = int(start_u1[0]), int(start_u1[-1])
    token_n, value_n = codes.token_n[begin:end].int(), codes.value_n[begin:end]
    offset_u = (start_u1[:-1] - begin).int()
    bags = (embedding_bag(token_n, tile, offset_u, mode="sum", per_sample_weights=value_n) for tile in tiles)
    return torch.cat(list(bags), dim=1)


def decoder_gram(W_dec_LMD: Tensor) -> Tensor:
    """<d_j^a, d_j^m> for all pairs of models (L, M, M), float64, on the CPU."""
    rows = max(1, CHUNK_VALUES[W_dec_LMD.device.type] // W_dec_LMD[0].numel())
    chunks = (chunk.detach().double() for chunk in W_dec_LMD.split(rows))
    return torch.cat([torch.einsum("jad,jmd->jam", chunk, chunk).cpu() for chunk in chunks])


def nu(sums: Tensor, gram_LMM: Tensor) -> tuple[Tensor, Tensor]:
    """nu_error and nu_reconstruction of all ordered pairs, each (..., L, M, M), [j, focus, other], float64.

    `sums` (..., L, 1 + 2 M^2) are those of `ScalingSums.total`, or of any selection of groups.

    beta_m(Y) = <d_j, sum_t f_j y_m> / (||d_j||^2 sum_t f_j^2) is the least-squares factor by which the focus model's
    latent f_j d_j explains the target y_m; nu = beta_other / beta_focus.

        nu_error           y_m = x_m - (recons_m - f_j d_j^m)     high: `other` uses it as well (complete shrinkage)
        nu_reconstruction  y_m = recons_m                         high: other latents rebuild it (latent decoupling)

    NaN for a latent that never fired, a focus whose row is zero, and beta_focus = 0. Source: arXiv 2504.02922; the sums
    give the same numbers as solving one regression per latent, model and target.
    """
    error_LMM, recons_LMM = products(sums, gram_LMM)
    return ratio_to(focus_of(error_LMM), error_LMM), ratio_to(focus_of(recons_LMM), recons_LMM)


def products(sums: Tensor, gram_LMM: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t f_j <d_j^focus, y_m> of the error target and of the reconstruction target, each (..., L, M, M).

    They are beta_m times ||d_j^focus||^2 sum_t f_j^2, which no ratio depends on.
    """
    num_models = gram_LMM.shape[-1]
    sum_f2, error, recons = sums.split([1, num_models**2, num_models**2], dim=-1)
    shape = (num_models, num_models)
    # f_j <d_j^focus, d_j^m>: the own contribution that the error target adds back, with m's own row.
    return error.unflatten(-1, shape) + gram_LMM * sum_f2[..., None], recons.unflatten(-1, shape)


def focus_of(product_LMM: Tensor) -> Tensor:
    """What the target of the focus model itself gives, (..., L, M, 1)."""
    return product_LMM.diagonal(dim1=-2, dim2=-1)[..., None]


def ratio_to(focus_LM1: Tensor, product_LMM: Tensor) -> Tensor:
    """The ratio to that of the focus, NaN where it is not finite."""
    nu_LMM = product_LMM / focus_LM1
    return torch.where(nu_LMM.isfinite(), nu_LMM, torch.nan)
