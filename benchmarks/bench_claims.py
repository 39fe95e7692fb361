"""How often a comparison claims a difference between two models that are equal.

    python -m benchmarks.bench_claims [comparisons]

Either model has 40 clusters of latents, each put at random into one of five categories with equal chances; the
latents of a cluster share the category, as near-duplicates do. Counted are comparisons in which some category is said
to differ: by Fisher's test and Benjamini-Hochberg alone, with the bootstrap over clusters as well, and by the rule of
`analysis.compare.claims`, which permutes clusters too. All are at 5 %.
"""

from __future__ import annotations

import sys

import numpy as np

from analysis.compare.bootstrap import Units
from analysis.compare.changes import Change
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts
from analysis.compare.pairwise import compare_counts
from analysis.compare.selected import Side
from benchmarks.timing import machine

ALPHA = 0.05
CLUSTERS, CATEGORIES = 40, 5
CLUSTER_SIZES = (1, 3, 5)
COMPARISONS = 200


def main() -> None:
    num = int(sys.argv[1]) if len(sys.argv) > 1 else COMPARISONS
    print(f"{machine()}; {num} comparisons of each kind")
    print(f"{'latents a cluster':>18}{'Fisher, BH':>12}{'and bootstrap':>15}{'our rule':>10}")
    for size in CLUSTER_SIZES:
        said = np.array([false_claims(size, seed) for seed in range(num)])
        fisher, bootstrap, ours = said.mean(axis=0)
        print(f"{size:>18}{fisher:>12.1%}{bootstrap:>15.1%}{ours:>10.1%}")


def false_claims(size: int, seed: int) -> tuple[bool, bool, bool]:
    """Whether each of the three rules claims something of one pair of equal models."""
    changes = compare(size, seed)
    by_test = [change for change in changes if change.q < ALPHA]
    with_bootstrap = [change for change in by_test if not low_to_high_holds_none(change)]
    return bool(by_test), bool(with_bootstrap), any(change.may_be_claimed for change in changes)


def low_to_high_holds_none(change: Change) -> bool:
    """Whether the bootstrap's interval of the difference holds no difference at all."""
    assert change.bootstrap_difference_low is not None and change.bootstrap_difference_high is not None
    return change.bootstrap_difference_low <= 0 <= change.bootstrap_difference_high


def compare(size: int, seed: int) -> list[Change]:
    """The categories of two equal models, whose clusters hold `size` latents each."""
    rng = np.random.default_rng([size, seed])
    cluster_n = np.repeat(np.arange(CLUSTERS), size)
    rows = [np.repeat(rng.integers(0, CATEGORIES, CLUSTERS), size) for _ in range(2)]
    units = tuple(Units(cluster_n, row[:, None], np.ones(len(row), int)) for row in rows)
    by_name = {str(name): [int((row == name).sum()) for row in rows] for name in range(CATEGORIES)}
    total = CLUSTERS * size
    sides = (Side(total, 0, frozenset()),) * 2
    counts = Counts("category", ["a", "b"], by_name, [total, total], units=units, sides=sides)
    (comparison,) = compare_counts(counts, CompareConfig(resamples=1000, seed=seed))
    return comparison.changes


if __name__ == "__main__":
    main()
