"""Which tokens count, and their exact statistics.

Left out are leading positions (attention sinks) and tokens whose norm in any model exceeds a multiple of that model's
mean norm over later positions. Manifests hold float64 sums over later positions; taking out the few outliers gives the
sums over kept tokens without another pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from extract.config import KeptConfig
from extract.errors import BadInput
from extract.stats import ActivationStatistics
from extract.stores import ActivationStore


@dataclass
class KeptTokens:
    """`mask` (tokens of the store,) bool over all rows; `statistics` of each model over the rows where it is true."""

    mask: np.ndarray
    statistics: list[ActivationStatistics]


def keep(stores: list[ActivationStore], lengths: np.ndarray, config: KeptConfig) -> KeptTokens:
    """Decide over the tokens of documents of `lengths` and compute each model's exact statistics over the kept ones."""
    position = np.concatenate([np.arange(length) for length in lengths])
    later = position >= config.skip_first_tokens
    mask = later.copy()
    for store in stores:
        norms = torch.cat([store.norms(i) for i in range(store.num_documents)]).double().numpy()
        mean = norms[later].mean() if later.any() else math.nan
        mask &= norms <= config.max_norm_ratio * mean
    if not mask.any():
        raise BadInput(
            f"No token is kept under kept.skip_first_tokens={config.skip_first_tokens} and "
            f"kept.max_norm_ratio={config.max_norm_ratio}. Lower the first or raise the second."
        )
    starts = np.cumsum(lengths) - lengths
    return KeptTokens(mask, [_statistics(store, mask, position, starts) for store in stores])


def _statistics(
    store: ActivationStore, mask: np.ndarray, position: np.ndarray, starts: np.ndarray
) -> ActivationStatistics:
    """The manifest's statistics, less tokens that it counts and `mask` does not, plus the reverse."""
    counted = position >= store.manifest.settings["skip_first_tokens"]
    statistics = store.statistics
    for sign, rows in ((-1, np.flatnonzero(counted & ~mask)), (1, np.flatnonzero(mask & ~counted))):
        if len(rows):
            documents = np.searchsorted(starts, rows, side="right") - 1
            x_ND = torch.stack(
                [store.document(int(i))[int(row - starts[i])] for i, row in zip(documents, rows, strict=True)]
            )
            part = ActivationStatistics.of(x_ND)
            statistics = statistics + part if sign > 0 else statistics - part
    return statistics


def scaling(statistics: list[ActivationStatistics], kind: str, models: list[str]) -> tuple[Tensor, Tensor]:
    """activation_mean (M, D) and activation_scale (M,), float32, so that scaled = (raw - mean) * scale.

    "norm": mean 0, scale sqrt(D) / (mean norm). "mean_variance": the mean activation, scale 1 / sqrt(variance averaged
    over dimensions). "none": 0 and 1.
    """
    means_MD = torch.zeros(len(statistics), len(statistics[0].sum), dtype=torch.float64)
    scales_M = torch.ones(len(statistics), dtype=torch.float64)
    for m, (model, values) in enumerate(zip(models, statistics, strict=True)):
        spread = values.mean_norm if kind == "norm" else float(values.variance.mean().sqrt())
        if kind != "none" and not spread > 0:
            raise BadInput(
                f"The activations of model {model} are all {'zero' if kind == 'norm' else 'equal'}: they cannot be "
                f"scaled (crosscoder.activation_scaling={kind}). Extract them again."
            )
        if kind == "norm":
            scales_M[m] = math.sqrt(means_MD.shape[1]) / spread
        elif kind == "mean_variance":
            means_MD[m], scales_M[m] = values.mean, 1 / spread
    return means_MD.float(), scales_M.float()
