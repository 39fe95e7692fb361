"""How many latents each rule and threshold would give to a model: `rules.csv`.

    delta_norm              the decoder norms alone (arXiv 2504.02922, its figure of relative norm differences)
    nu                      nu_error and nu_reconstruction alone (arXiv 2509.18792), at several thresholds
    delta_norm_and_nu       both
    configured              what `latents.parquet` says, sets of models, shared, other and dead included; of a
                            crosscoder with dedicated latents, that of the others
    configured_dedicated    the same of dedicated latents, which are not asked for a Delta-norm

By the first three a latent counts for a model if the rule holds towards every other model; by nu alone it may count for
several. A latent that never fired counts for none.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from itertools import product

import numpy as np

from analysis.config import NOT_MODELS, OwnerConfig

HEADING = ("rule", "delta_norm_low", "delta_norm_high", "max_nu_error", "max_nu_reconstruction", "owner", "count")
# The largest Delta-norm of a latent of the first model; 1 - this is the smallest of one of the second.
DELTA_NORMS = (0.05, 0.1, 0.2, 0.3)
# (|nu_error|, |nu_reconstruction|) below these; the third is the rule of both papers.
NUS = ((0.05, 0.1), (0.1, 0.2), (0.2, 0.5), (0.3, 0.5), (0.5, 0.5), (0.2, 0.75), (0.5, 1.0))


def rules_csv(
    delta_norm_LMM: np.ndarray,
    nu_LMM: tuple[np.ndarray, np.ndarray],
    fired_L: np.ndarray,
    owner_L: np.ndarray,
    is_dedicated_L: np.ndarray,
    models: list[str],
    config: OwnerConfig,
) -> str:
    """The table as CSV; cells of thresholds that a rule does not ask for are empty."""
    own = (config.delta_norm_low, config.delta_norm_high)
    deltas = sorted({own, *((low, 1 - low) for low in DELTA_NORMS)})
    nus = sorted({(config.max_nu_error, config.max_nu_reconstruction), *NUS})
    rows: list[tuple[object, ...]] = []

    def add(is_own_LM: np.ndarray, *rule: object) -> None:
        counts_M = (is_own_LM & fired_L[:, None]).sum(axis=0).tolist()
        rows.extend((*rule, model, count) for model, count in zip(models, counts_M, strict=True))

    by_norm = {limits: exclusive_by_norm(delta_norm_LMM, *limits) for limits in deltas}
    by_nu = {limits: exclusive_by_nu(*nu_LMM, *limits) for limits in nus}
    for limits, is_own_LM in by_norm.items():
        add(is_own_LM, "delta_norm", *limits, "", "")
    for limits, is_own_LM in by_nu.items():
        add(is_own_LM, "nu", "", "", *limits)
    for (norms, is_norm_LM), (limits, is_nu_LM) in product(by_norm.items(), by_nu.items()):
        add(is_norm_LM & is_nu_LM, "delta_norm_and_nu", *norms, *limits)
    named = [*models, *sorted({*owner_L.tolist()} - {*models, *NOT_MODELS}), *NOT_MODELS]
    for rule, mask_L in (
        (("configured", *own, config.max_nu_error, config.max_nu_reconstruction), ~is_dedicated_L),
        (("configured_dedicated", "", "", config.max_nu_error, config.max_nu_reconstruction_dedicated), is_dedicated_L),
    ):
        counts = Counter(owner_L[mask_L].tolist())
        rows += [(*rule, owner, counts[owner]) for owner in named if mask_L.any()]
    return _csv(rows)


def exclusive_by_norm(delta_norm_LMM: np.ndarray, low: float, high: float) -> np.ndarray:
    """(L, M): Delta-norm is beyond the thresholds towards every other model. [j, a, b] is that of the pair (a, b)."""
    models = np.arange(delta_norm_LMM.shape[1])
    before = models[:, None] < models
    # Of the pair in the models' order: below `low` it is the first one's, above `high` the second one's.
    passes_LMM = np.where(before, delta_norm_LMM < low, delta_norm_LMM.swapaxes(1, 2) > high)
    return np.all(passes_LMM | np.eye(len(models), dtype=bool), axis=2)


def exclusive_by_nu(
    error_LMM: np.ndarray, reconstruction_LMM: np.ndarray, max_error: float, max_reconstruction: float
) -> np.ndarray:
    """(L, M): with m as focus, both nu are small towards every other model; NaN passes no threshold."""
    passes_LMM = (np.abs(error_LMM) < max_error) & (np.abs(reconstruction_LMM) < max_reconstruction)
    return np.all(passes_LMM | np.eye(error_LMM.shape[1], dtype=bool), axis=2)


def _csv(rows: list[tuple[object, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADING)
    writer.writerows([f"{cell:g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return text.getvalue()
