"""What nu is where it should be near 0, and where it should be near 1: what thresholds on it can tell apart.

    random_direction    the other model is asked for a random direction r_j of the norm of d_j: how large |nu| gets by
                        chance, with the same activations, when the other model has nothing to do with the latent:
                        nu = beta_other(r_j) / beta_focus(d_j)
    shared              latents that Delta-norm calls shared, with their own directions: how often a latent of both
                        models passes for one of a single model

Shapes: N latents with a random direction, M models, D width, L latents; u rows of a batch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.config import OwnerConfig
from analysis.firings.config import NullsConfig
from analysis.latents.scaling import focus_of, products, ratio_to

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MEASURES = ("nu_error", "nu_reconstruction")


class RandomDirections:
    """The sums of latent scaling along random unit directions r_j: sums (N, 2, M), [j, error and recons, m], float64.

    `latent_N` are the latents, drawn among all.
    """

    def __init__(self, num_latents: int, num_models: int, d_model: int, config: NullsConfig, device: torch.device):
        generator = np.random.default_rng(config.seed)
        drawn = np.sort(generator.permutation(num_latents)[: config.num_latents])
        self.latent_N = torch.from_numpy(drawn).to(device)
        random_ND = torch.from_numpy(generator.standard_normal((len(drawn), d_model), dtype=np.float32))
        self.unit_ND = torch.nn.functional.normalize(random_ND, dim=1).to(device)
        self.sums = torch.zeros(len(drawn), 2, num_models, dtype=torch.float64, device=device)
        self._place_L = torch.full((num_latents,), -1, dtype=torch.int64, device=device)
        self._place_L[self.latent_N] = torch.arange(len(drawn), device=device)

    def add(self, latent_u: Tensor, target: int, sums_uMD: Tensor) -> None:
        """Adds the sums of rows; see `scaling.Watch`."""
        place_u = self._place_L[latent_u]
        chosen = (place_u >= 0).nonzero().squeeze(1)
        place_v = place_u[chosen]
        units_vD1 = self.unit_ND[place_v].to(sums_uMD.dtype)[:, :, None]
        dots_vM = torch.bmm(sums_uMD[chosen], units_vD1)[:, :, 0]
        self.sums[:, target].index_add_(0, place_v, dots_vM.double())

    def nu(self, total_LK: Tensor, W_dec_LMD: Tensor, gram_LMM: Tensor) -> tuple[Tensor, Tensor]:
        """nu_error and nu_reconstruction (N, M, M), [j, focus, other], NaN as by `scaling.nu`.

        With r = ||d_j^focus|| r_j, beta_other(r) = <r, sum_t f_j y_other> / (||d_j^focus||^2 sum_t f_j^2), where the
        error target adds back f_j d_j^other as for the latent's own direction.
        """
        latent_N = self.latent_N.cpu()
        gram_NMM, total_NK = gram_LMM[latent_N], total_LK[latent_N]
        norm_NM1 = gram_NMM.diagonal(dim1=1, dim2=2).sqrt()[..., None]
        error_N1M, recons_N1M = self.sums.cpu()[:, :, None].unbind(1)
        rows_NMD, unit_ND = W_dec_LMD[self.latent_N].double().cpu(), self.unit_ND.double().cpu()
        own_N1M = torch.einsum("nmd,nd->nm", rows_NMD, unit_ND)[:, None] * total_NK[:, :1, None]
        focus_error, focus_recons = (focus_of(product) for product in products(total_NK, gram_NMM))
        random_error, random_recons = norm_NM1 * (error_N1M + own_N1M), norm_NM1 * recons_N1M
        return ratio_to(focus_error, random_error), ratio_to(focus_recons, random_recons)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums.cpu().numpy()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on after `arrays` of the same stream."""
        self.sums.copy_(torch.from_numpy(arrays["sums"]))


@dataclass(frozen=True)
class Null:
    """One null: its name and nu_error, nu_reconstruction (N, M, M) of its latents."""

    name: str
    values: tuple[np.ndarray, np.ndarray]


def null_rows(nulls: list[Null], models: list[str], owner: OwnerConfig) -> list[list[object]]:
    """Lines of `nulls.csv` for every ordered pair of models: quantiles of nu, and shares of |nu| below thresholds."""
    thresholds = (owner.max_nu_error, owner.max_nu_reconstruction)
    rows: list[list[object]] = []
    pairs = [(a, b) for a in range(len(models)) for b in range(len(models)) if a != b]
    for null in nulls:
        for focus, other in pairs:
            error_N, recons_N = (values[:, focus, other] for values in null.values)
            defined_N = ~(np.isnan(error_N) | np.isnan(recons_N))
            both = [error_N[defined_N], recons_N[defined_N]]
            passes = [np.abs(values) < limit for values, limit in zip(both, thresholds, strict=True)]
            count = int(defined_N.sum())
            for measure, values, limit, pass_N in zip(MEASURES, both, thresholds, passes, strict=True):
                quantiles, shares = [""] * len(QUANTILES), ["", ""]
                if count:
                    quantiles = [f"{value:.6g}" for value in np.quantile(values, QUANTILES)]
                    shares = [f"{share:.6g}" for share in (pass_N.mean(), (passes[0] & passes[1]).mean())]
                line = [null.name, measure, models[focus], models[other], count, *quantiles, f"{limit:.6g}", *shares]
                rows.append(line)
    return rows


def nulls_csv(rows: list[list[object]]) -> str:
    """`nulls.csv` with its heading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quantiles = [f"q{round(100 * share):02d}" for share in QUANTILES]
    ends = ["threshold", "share_passing", "share_passing_both"]
    writer.writerow(["null", "measure", "focus", "other", "count", *quantiles, *ends])
    writer.writerows(rows)
    return text.getvalue()
