"""Tests by dealing the latents out anew: what counts would look like if the models did not differ at all.

Clusters of near-duplicates are dealt out whole, each model getting as many clusters as it has, those in which nothing
is placed apart. Where every latent is its own cluster this is exact given how many latents each model and each category
has, up to Monte-Carlo error.
Shapes: G clusters, M models, C names and one column for latents in none of them, R permutations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.compare.bootstrap import CHUNK, LOST, Units

# Statistics that differ in their last digits are equal.
TIE = 1e-9


def counts_of(units: Units, num_names: int) -> np.ndarray:
    """(G, C + 1) latents by cluster and name, by their primary votes; those that are lost count nowhere.

    Clusters of lost latents alone are left out: dealt out too, they would change the models' numbers of latents.
    """
    primary_n = units.votes_nV[:, 0]
    counts_GC = np.zeros((units.num_clusters, num_names + 1))
    placed = primary_n != LOST
    np.add.at(counts_GC, (units.cluster_n[placed], primary_n[placed]), 1)  # IN_NONE is -1, the last column
    return counts_GC[counts_GC.any(1)]


def dealt_out(units: Sequence[Units], num_names: int, num_permutations: int, seed: int = 0) -> np.ndarray:
    """(R, M, C + 1) counts of models to which all clusters were dealt out anew."""
    counts = [counts_of(unit, num_names) for unit in units]
    sizes, clusters_GC, rng = [len(rows) for rows in counts], np.concatenate(counts), np.random.default_rng(seed)
    if (clusters_GC.sum(1) == 1).all():
        return _dealt_singly(clusters_GC.sum(0).astype(int), sizes, num_permutations, rng)
    model_G = np.repeat(np.arange(len(units)), sizes)
    per_chunk = max(1, CHUNK // max(len(model_G), 1))
    found = []
    for start in range(0, num_permutations, per_chunk):
        rows = min(per_chunk, num_permutations - start)
        dealt_RG = rng.permuted(np.broadcast_to(model_G, (rows, len(model_G))), axis=1)
        found.append(np.stack([(dealt_RG == model) @ clusters_GC for model in range(len(units))], axis=1))
    return np.concatenate(found)


def _dealt_singly(pool_C: np.ndarray, sizes: list[int], num_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """(R, M, C + 1) counts where every latent stands alone: the same draws from a pool of names, latents not laid out.

    Given what is left, the latents of one name that a model gets are hypergeometric.
    """
    left_RC = np.tile(pool_C, (num_permutations, 1))
    dealt_RMC = np.zeros((num_permutations, len(sizes), len(pool_C)))
    for model, size in enumerate(sizes):
        wanted_R = np.full(num_permutations, size)
        for name in range(len(pool_C)):
            drawn_R = rng.hypergeometric(left_RC[:, name], left_RC[:, name + 1 :].sum(1), wanted_R)
            dealt_RMC[:, model, name] = drawn_R
            wanted_R -= drawn_R
        left_RC -= dealt_RMC[:, model].astype(int)
    return dealt_RMC


def homogeneity(observed_MC: np.ndarray, dealt_RMC: np.ndarray) -> float:
    """p that all models distribute their latents over the categories alike; 1 when there is nothing to compare.

    Most expected counts are below five, where the chi-square distribution misleads, so that its statistic is referred
    to the permutations, of which the observed table is one.
    """
    if (observed_MC.sum(0) > 0).sum() < 2 or (observed_MC.sum(1) == 0).any():
        return 1.0
    statistic, permuted_R = _chi_square(observed_MC[None])[0], _chi_square(dealt_RMC)
    return float(((permuted_R >= statistic * (1 - TIE)).sum() + 1) / (len(permuted_R) + 1))


def homogeneity_by_other_votes(
    units: Sequence[Units], num_names: int, num_permutations: int, seed: int = 0
) -> list[float]:
    """p of `homogeneity` where the second votes put the latents into categories, the third, ...; none of one vote."""
    pvalues = []
    for vote in range(1, max(unit.num_votes for unit in units)):
        read = [unit.read_by(vote) for unit in units]
        observed_MC = np.array([counts_of(unit, num_names).sum(0) for unit in read])
        pvalues.append(homogeneity(observed_MC, dealt_out(read, num_names, num_permutations, seed)))
    return pvalues


def _chi_square(table_RMC: np.ndarray) -> np.ndarray:
    """sum (observed - expected)^2 / expected of each table; what nobody has adds nothing."""
    rows, columns = table_RMC.sum(2, keepdims=True), table_RMC.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = rows * columns / rows.sum(1, keepdims=True)
        return np.nan_to_num((table_RMC - expected) ** 2 / expected, nan=0.0).sum((1, 2))


def differences(observed_2C: np.ndarray, dealt_R2C: np.ndarray) -> list[float]:
    """Two-sided p of every name that both models have the same share: how often the shares differ as much by chance.

    What Fisher's test says of latents that are independent, for latents that come in clusters.
    """
    with np.errstate(invalid="ignore"):
        observed_C, dealt_RC = (_difference(table)[..., :-1] for table in (observed_2C, dealt_R2C))
    as_large_C = (np.abs(dealt_RC) >= np.abs(observed_C) - TIE).sum(0)
    return [float(p) for p in (as_large_C + 1) / (len(dealt_RC) + 1)]


def _difference(table: np.ndarray) -> np.ndarray:
    shares = table / table.sum(-1, keepdims=True)
    return shares[..., 1, :] - shares[..., 0, :]


def chance_of_change(observed_2C: np.ndarray, dealt_R2C: np.ndarray) -> list[float]:
    """For each name, how often chance alone makes some name change at least as much in the same direction.

    The share of permutations in which the largest rise (for a fall, the largest fall) of all names is as large as the
    one observed, which counts as one of them: the max-statistic test of the change, corrected for the number of names.
    NaN without a change.
    """
    ratios_RC = np.nan_to_num(_ratios(dealt_R2C), nan=1.0, posinf=np.inf)
    highest_R, lowest_R = ratios_RC.max(1, initial=0.0), ratios_RC.min(1, initial=np.inf)
    return [_share_as_extreme(ratio, highest_R, lowest_R) for ratio in _ratios(observed_2C[None])[0]]


def _ratios(table_R2C: np.ndarray) -> np.ndarray:
    """share_b / share_a by name; infinite or NaN without latents of a."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = table_R2C / table_R2C.sum(2, keepdims=True)
        return (shares[:, 1] / shares[:, 0])[:, :-1]


def _share_as_extreme(ratio: float, highest_R: np.ndarray, lowest_R: np.ndarray) -> float:
    if np.isnan(ratio) or ratio == 1:
        return float("nan")
    as_extreme = highest_R >= ratio * (1 - TIE) if ratio > 1 else lowest_R <= ratio * (1 + TIE)
    return float((as_extreme.sum() + 1) / (len(highest_R) + 1))
