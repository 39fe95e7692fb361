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
    clusters and votes. `chance`: probability that some category changes as much by chance alone; NaN where one model
    has none, since any rare category can vanish. `detectable_*`: the smallest true changes of which q would be small
    enough at the power asked for, and `power_of_doubling`: how surely that of a doubling would be, both by the level of
    the tests divided by their number, below which q always is; `one_test_*`: the same of one uncorrected test.
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
    one_test_rise: float
    one_test_fall: float
    one_test_doubling: float
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


class Findable(NamedTuple):
    """What can be found of a category with that share in model a: after the correction, and by one uncorrected test."""

    share: float
    corrected: power.Detectable
    one_test: power.Detectable


def findable(share: float, totals: tuple[int, int], config: CompareConfig, num_tests: int) -> Findable:
    """`num_tests` share the level: q is below it wherever p is below a `num_tests`-th of it (a true change alone among
    others that are none needs about that).
    """
    levels = (config.alpha / num_tests, config.alpha)
    return Findable(share, *(power.detectable(share, *totals, config.power, level) for level in levels))


@dataclass(frozen=True)
class Basis:
    """What the counts of the two models rest on; None and 0 where counts alone are known."""

    # Latents selected as the models' own, those that were lost before they had a category included.
    selected: tuple[int, int] | None = None
    # Clusters of near-duplicates that the latents form.
    clusters: tuple[int, int] | None = None
    # The most votes that a latent has.
    num_votes: int = 0
    # Of the selected latents, those that are certain by the intervals of nu, and those that have none.
    certain: tuple[int, int] | None = None
    without_interval: tuple[int, int] = (0, 0)
    # Latents put into their category by people.
    by_people: tuple[int, int] = (0, 0)
    # Who described and placed the latents of either model.
    annotators: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    # What the latents of the two models were selected and named with unlike each other.
    differing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Model b against model a over all categories (or classes). `claim` says what the numbers allow.

    `global_p`: that both distribute their latents alike, by the primary votes; `global_p_votes`: the largest by any of
    the votes; `global_p_corrected`: that by Holm over the comparisons, None where nothing is claimed of it.
    """

    level: str
    model_a: str
    model_b: str
    changes: list[Change]
    global_p: float
    global_p_votes: float
    global_p_corrected: float | None
    # p that all compared models are alike; None where there are only two.
    global_p_of_all: float | None
    claim: str
    config: CompareConfig
    # Who described the latents and put them into categories; empty for counts of a file.
    annotator: str
    # What the numbers cannot say, whatever they are.
    caveat: str
    # Names that were looked at, and comparisons in which they were: q is corrected for the product.
    num_names: int
    num_comparisons: int
    # What could be found of a category of average size.
    average: Findable
    basis: Basis
    # The same of the certain latents alone; None where nothing is known of single latents.
    certain: Comparison | None = None

    @property
    def num_tests(self) -> int:
        """The tests that q is corrected for."""
        return self.num_names * self.num_comparisons

    @property
    def differs_as_a_whole(self) -> bool:
        """Whether it may be claimed that the models differ, be it in whatever category."""
        return self.global_p_corrected is not None and self.global_p_corrected < self.config.alpha

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

    def among_certain(self, change: Change) -> Change | None:
        """One of the changes as it is among the certain latents alone."""
        return next((one for one in self.certain.changes if one.name == change.name), None) if self.certain else None


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
    num_tests: int,
) -> Change:
    """Everything that is computed of one category. What may be claimed is left open."""
    count_a, total_a, count_b, total_b = table
    difference, ratio = statistics.newcombe(*table, config.confidence), statistics.katz(*table, config.confidence)
    share_a, share_b = (count / total if total else NAN for count, total in ((count_a, total_a), (count_b, total_b)))
    found = findable(share_a if count_a else 0.0, (total_a, total_b), config, num_tests)
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
        chance if count_a and count_b else NAN,
        *found.corrected,
        *found.one_test,
        *sensitivity.undone_by_label_errors(*table, config.label_error, num_names),
        may_be_claimed=False,
        claim="",
    )
