"""Which tokens count, and their exact statistics.

Left out are leading positions (attention sinks) and tokens whose norm in any model exceeds a multiple of that model's
mean norm over later positions. Manifests hold float64 sums over later positions; taking out the few outliers gives the
sums over kept tokens without another pass.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.config import KeptConfig
from extract.errors import BadInput
from extract.stats import ActivationStatistics
from extract.stores import ActivationStore
from train.cache import cached

THREADS = 16  # that read the norms of shards: each waits for the disk most of the time
GATHERED_ROWS = 4096  # that are taken out or added at a time


@dataclass
class KeptTokens:
    """`mask` (tokens of the store,) bool over all rows; `statistics` of each model over the rows where it is true."""

    mask: np.ndarray
    statistics: list[ActivationStatistics]

    def of_documents(self, row_starts: np.ndarray) -> np.ndarray:
        """How many each document has (num_documents,), int64. No array is as long as the mask, as `reduceat` makes."""
        bounds = pairwise(row_starts.tolist())
        return np.array([np.count_nonzero(self.mask[start:end]) for start, end in bounds], dtype=np.int64)


def keep(stores: list[ActivationStore], config: KeptConfig, cache: Path) -> KeptTokens:
    """Decide over all tokens of the stores' documents and compute each model's exact statistics over the kept ones.

    It takes every norm of every shard, so the folder `cache` keeps the result for these stores and this `config`.
    """
    key = {"stores": [store.manifest.content_sha256() for store in stores], "kept": asdict(config)}
    found = cached(cache, "tokens", key, lambda: _to_tensors(_keep(stores, config)))
    return _from_tensors(found)


def _keep(stores: list[ActivationStore], config: KeptConfig) -> KeptTokens:
    later = later_positions(stores[0].row_starts, config.skip_first_tokens)
    mask = later.copy()
    for store in stores:
        with ThreadPoolExecutor(THREADS) as threads:
            norms = np.concatenate(list(threads.map(store.norms_of_shard, range(store.num_shards))))
        mean = norms[later].mean(dtype=np.float64) if later.any() else math.nan
        mask &= norms <= config.max_norm_ratio * mean
    if not mask.any():
        raise BadInput(
            f"No token is kept under kept.skip_first_tokens={config.skip_first_tokens} and "
            f"kept.max_norm_ratio={config.max_norm_ratio}. Lower the first or raise the second."
        )
    return KeptTokens(mask, [_statistics(store, mask) for store in stores])


def later_positions(row_starts: np.ndarray, skip_first_tokens: int) -> np.ndarray:
    """Mask (tokens of the store,): false for the first `skip_first_tokens` tokens of every document."""
    starts, ends = row_starts[:-1], row_starts[1:]
    mask = np.ones(ends[-1], dtype=bool)
    for position in range(skip_first_tokens):
        mask[(starts + position)[starts + position < ends]] = False
    return mask


def _statistics(store: ActivationStore, mask: np.ndarray) -> ActivationStatistics:
    """The manifest's statistics, less tokens that it counts and `mask` does not, plus the reverse."""
    counted = later_positions(store.row_starts, store.manifest.settings["skip_first_tokens"])
    statistics = store.statistics
    for sign, rows in ((-1, np.flatnonzero(counted & ~mask)), (1, np.flatnonzero(mask & ~counted))):
        for start in range(0, len(rows), GATHERED_ROWS):
            part = ActivationStatistics.of(store.gather(rows[start : start + GATHERED_ROWS]))
            statistics = statistics + part if sign > 0 else statistics - part
    return statistics


def _to_tensors(kept: KeptTokens) -> dict[str, Tensor]:
    """M models side by side: counts (M,), sums of norms (M,), sums and sums of squares (M, D)."""
    statistics = kept.statistics
    return {
        "mask": torch.from_numpy(kept.mask),
        "count": torch.tensor([values.count for values in statistics]),
        "sum": torch.stack([values.sum for values in statistics]),
        "sum_squares": torch.stack([values.sum_squares for values in statistics]),
        "sum_norm": torch.tensor([values.sum_norm for values in statistics], dtype=torch.float64),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> KeptTokens:
    columns = tensors["count"].tolist(), tensors["sum"], tensors["sum_squares"], tensors["sum_norm"].tolist()
    return KeptTokens(tensors["mask"].numpy(), [ActivationStatistics(*row) for row in zip(*columns, strict=True)])


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
