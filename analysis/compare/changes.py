"""What a comparison of two models holds: a `Change` for every category, and the `Comparison` over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from analysis.compare import power, sensitivity, statistics
from analysis.compare.bootstrap import Resampled
from analysis.compare.config import CompareConfig

NAN = float("nan")

# (count_a, total_a, count_b, total_b) of one category.
Fourfold = tuple[int, int, int, int]


@dataclass(frozen=True)
class Change:
    """One category (or class) in two models; shares, differences and changes are fractions, not percent.

    Intervals: `share` Wilson, `difference` Newcombe, `change` Katz. `p` is Fisher's, `q` after Benjamini-Hochberg;
    `*_clusters`: the same by permuting clusters of near-duplicates, equal where there are none.
    `without_one`: range of the change with one latent (or cluster of near-duplicates) left out. `bootstrap_*`: over
    clusters and votes. `chance`: probability that some category changes as much by chance alone. `detectable_*`: the
    smallest changes that one uncorrected test would find, and `power_of_doubling`: how surely it would find a doubling.
    `undone_*`: how often label errors leave the larger count, or share, no longer ahead. `claim`: what may be said.
    """

    name: str
    count_a: int
    total_a: int
    share_a: float
    share_a_low: float
    share_a_high: float
    count_b: int
    total_b: int
    share_b: float
    share_b_low: float
    share_b_high: float
    difference: float
    difference_low: float
    difference_high: float
    change: float
    change_low: float
    change_high: float
    p: float
    q: float
    p_clusters: float
    q_clusters: float
    without_one_low: float
    without_one_high: float
    bootstrap_difference_low: float
    bootstrap_difference_high: float
    bootstrap_change_low: float
    bootstrap_change_high: float
    chance: float
    detectable_rise: float
    detectable_fall: float
    power_of_doubling: float
    undone_counts: float
    undone_shares: float
    may_be_claimed: bool
    claim: str


class PValues(NamedTuple):
    """p and q of one category: Fisher's, and by permuting clusters."""

    p: float
    q: float
    p_clusters: float
    q_clusters: float


@dataclass(frozen=True)
class Basis:
    """What the counts of the two models rest on; None and 0 where counts alone are known."""

    # Latents selected as the models' own, those that were lost before they had a category included.
    selected: tuple[int, int] | None = None
    # Clusters of near-duplicates that the latents form.
    clusters: tuple[int, int] | None = None
    # The most votes that a latent has.
    num_votes: int = 0
    # Latents put into their category by people.
    by_people: tuple[int, int] = (0, 0)
    # Who described and placed the latents of either model.
    annotators: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())


@dataclass(frozen=True)
class Comparison:
    """Model b against model a over all categories (or classes). `claim` says what the numbers allow."""

    level: str
    model_a: str
    model_b: str
    changes: list[Change]
    global_p: float
    claim: str
    confidence: float
    # The level of the tests.
    alpha: float
    # Who described the latents and put them into categories; empty for counts of a file.
    annotator: str
    # What the numbers cannot say, whatever they are.
    caveat: str
    # Names that were looked at, and comparisons in which they were: q is corrected for the product.
    num_names: int
    num_comparisons: int
    # p that all compared models are alike; None where there are only two.
    global_p_of_all: float | None
    # The probability behind "would be found".
    power: float
    basis: Basis

    @property
    def totals(self) -> tuple[int, int]:
        """Latents of either model that the shares are of."""
        return (self.changes[0].total_a, self.changes[0].total_b) if self.changes else (0, 0)

    @property
    def unclassified(self) -> tuple[int, int]:
        """Latents of either model in no category: they count towards the totals alone."""
        total_a, total_b = self.totals
        named_a, named_b = (sum(getattr(change, f"count_{side}") for change in self.changes) for side in "ab")
        return total_a - named_a, total_b - named_b


def change_of(
    name: str,
    table: Fourfold,
    config: CompareConfig,
    *,
    tests: PValues,
    chance: float,
    resampled: Resampled,
    clusters: tuple[set[sensitivity.Cluster], set[sensitivity.Cluster]],
    num_names: int,
) -> Change:
    """Everything that is computed of one category. What may be claimed is left open."""
    count_a, total_a, count_b, total_b = table
    difference, ratio = statistics.newcombe(*table, config.confidence), statistics.katz(*table, config.confidence)
    share_a, share_b = (count / total if total else NAN for count, total in ((count_a, total_a), (count_b, total_b)))
    return Change(
        name,
        *(count_a, total_a, share_a, *statistics.wilson(count_a, total_a, config.confidence)),
        *(count_b, total_b, share_b, *statistics.wilson(count_b, total_b, config.confidence)),
        *(share_b - share_a, *difference),
        *(statistics.ratio(*table) - 1, ratio.low - 1, ratio.high - 1),
        *(tests.p, tests.q, tests.p_clusters, tests.q_clusters),
        *sensitivity.leave_one_out(*table, *clusters),
        *resampled.difference,
        *resampled.change,
        chance,
        *_detectable(count_a, total_a, total_b, config),
        *sensitivity.undone_by_label_errors(*table, config.label_error, num_names),
        may_be_claimed=False,
        claim="",
    )


def _detectable(count_a: int, total_a: int, total_b: int, config: CompareConfig) -> tuple[float, float, float]:
    """The smallest rise and fall from the share of a that would be found, and the power for a doubling."""
    if not count_a or not total_b:
        return float("inf"), NAN, NAN
    share, sizes = count_a / total_a, (total_a, total_b)
    doubling = power.power(share, 2 * share, *sizes, config.alpha) if share <= 0.5 else NAN
    rise = power.detectable_rise(share, *sizes, config.power, config.alpha)
    return rise, power.detectable_fall(share, *sizes, config.power, config.alpha), doubling
