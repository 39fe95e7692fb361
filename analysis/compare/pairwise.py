"""Two models set against each other, category by category, from their counts.

Frequency of a category is its share of one model's placed latents, those in no category included; change is the ratio
of two shares minus one (arXiv 2509.18792). Intervals: Wilson for shares, Newcombe for differences, Katz for ratios, and
a bootstrap over clusters of near-duplicates and votes; tests: Fisher's, corrected by Benjamini-Hochberg over all
categories of all comparisons that share a base, and one over all categories at once, by Holm over these comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

from analysis.compare import permutation, statistics
from analysis.compare.bootstrap import Units, bootstrap, units_of_counts
from analysis.compare.changes import NAN, Basis, Change, Comparison, Fourfold, PValues, change_of, findable
from analysis.compare.claims import are_alike, caveat_of, claim_of, may_be_claimed, sentence_of
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts
from analysis.made_with import differing


@dataclass(frozen=True)
class Family:
    """The tests that are corrected together: names looked at, comparisons, and p that all their models are alike."""

    num_names: int
    num_comparisons: int
    global_p: float | None

    @property
    def num_tests(self) -> int:
        return self.num_names * self.num_comparisons


class Whole(NamedTuple):
    """p that two models distribute their latents alike: by primary votes, the largest by any vote, that corrected."""

    p: float
    p_votes: float
    p_corrected: float | None


def pairs_of_models(models: list[str], config: CompareConfig) -> list[tuple[str, str]]:
    """(a, b) of every comparison: the other models against the reference, or every model against those before it."""
    if config.every_pair:
        return list(combinations(models, 2))
    first = config.reference if config.reference in models else models[0]
    return [(first, model) for model in models if model != first]


@dataclass(frozen=True)
class Pair:
    """The counts of models a and b, columns of `Counts`, by name and in none, and permutations of them."""

    columns: tuple[int, int]
    units: tuple[Units, Units]
    tables: list[Fourfold]
    observed_2C: np.ndarray
    dealt_R2C: np.ndarray

    @property
    def has_clusters(self) -> bool:
        """Whether some latents are near-duplicates."""
        return any(units.num_clusters < len(units.cluster_n) for units in self.units)

    @property
    def has_both_sides(self) -> bool:
        """Whether both models have latents."""
        return bool(self.observed_2C.sum(1).all())


def compare_counts(counts: Counts, config: CompareConfig) -> list[Comparison]:
    """All comparisons of the models of `counts`; their q are corrected together."""
    names = [(counts.models.index(a), counts.models.index(b)) for a, b in pairs_of_models(counts.models, config)]
    units = counts.units or tuple(_units(counts, column) for column in range(len(counts.models)))
    pairs = [_pair(counts, columns, units, config) for columns in names]
    num_names = max(counts.num_tests, len(counts.by_name))
    global_p = None
    if len(units) > 2:
        global_p = permutation.homogeneity(*_permuted(counts, range(len(units)), units, config))
    family = Family(num_names, len(pairs), global_p)
    certain = compare_counts(counts.certain, config) if counts.certain else [None] * len(pairs)
    return [
        _comparison(counts, pair, tests, whole, family, config, alone)
        for pair, tests, whole, alone in zip(
            pairs, _tests(pairs, num_names), _whole(counts, pairs, num_names, config), certain, strict=True
        )
    ]


def _units(counts: Counts, column: int) -> Units:
    named = [row[column] for row in counts.by_name.values()]
    return units_of_counts(named, counts.totals[column] - sum(named))


def _pair(counts: Counts, columns: tuple[int, int], units: Sequence[Units], config: CompareConfig) -> Pair:
    a, b = columns
    tables = [(row[a], counts.totals[a], row[b], counts.totals[b]) for row in counts.by_name.values()]
    return Pair(columns, (units[a], units[b]), tables, *_permuted(counts, columns, units, config))


def _permuted(
    counts: Counts, columns: Sequence[int], units: Sequence[Units], config: CompareConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The counts of some models by name and in none, (M, C + 1), and those of permutations, (R, M, C + 1)."""
    named = [[row[column] for row in counts.by_name.values()] for column in columns]
    rows = [[*row, counts.totals[column] - sum(row)] for column, row in zip(columns, named, strict=True)]
    chosen = [units[column] for column in columns]
    dealt = permutation.dealt_out(chosen, len(counts.by_name), config.resamples, config.seed)
    return np.array(rows, dtype=float), dealt


def _tests(pairs: list[Pair], num_names: int) -> list[list[PValues]]:
    """The tests of every name of every pair, corrected together."""
    fisher = [[_fisher(table) for table in pair.tables] for pair in pairs]
    clusters = [
        permutation.differences(pair.observed_2C, pair.dealt_R2C) if pair.has_clusters and pair.has_both_sides else p
        for pair, p in zip(pairs, fisher, strict=True)
    ]
    # A name without a row was looked at too; its p is unknown, so it counts as the largest.
    unseen = [1.0] * sum(num_names - len(row) for row in fisher)
    q, q_clusters = (iter(statistics.benjamini_hochberg([*chain(*rows), *unseen])) for rows in (fisher, clusters))
    return [
        [PValues(p, next(q), p_clusters, next(q_clusters)) for p, p_clusters in zip(*rows, strict=True)]
        for rows in zip(fisher, clusters, strict=True)
    ]


def _whole(counts: Counts, pairs: list[Pair], num_names: int, config: CompareConfig) -> list[Whole]:
    """The global tests of all pairs. One level is tested, and only with all of its names: of classes whose categories
    are compared too, and where names lack a row, p is a number alone.
    """
    primary = [permutation.homogeneity(pair.observed_2C, pair.dealt_R2C) for pair in pairs]
    draws = (len(counts.by_name), config.resamples, config.seed)
    others = [permutation.homogeneity_by_other_votes(pair.units, *draws) for pair in pairs]
    by_any = [max([p, *by_other]) for p, by_other in zip(primary, others, strict=True)]
    is_tested = not counts.has_categories and num_names == len(counts.by_name)
    corrected = statistics.holm(by_any) if is_tested else [None] * len(pairs)
    return list(map(Whole, primary, by_any, corrected))


def _fisher(table: Fourfold) -> float:
    return statistics.fisher(*table) if table[1] and table[3] else 1.0


def _comparison(
    counts: Counts,
    pair: Pair,
    tests: list[PValues],
    whole: Whole,
    family: Family,
    config: CompareConfig,
    certain: Comparison | None,
) -> Comparison:
    a, b = pair.columns
    models, totals = (counts.models[a], counts.models[b]), (counts.totals[a], counts.totals[b])
    basis, changes = _basis(counts, pair), _changes(list(counts.by_name), pair, tests, family, config)
    claimed = [replace(change, may_be_claimed=may_be_claimed(change, basis, config.alpha)) for change in changes]
    bare = Comparison(
        level=counts.level,
        model_a=models[0],
        model_b=models[1],
        changes=claimed,
        global_p=whole.p,
        global_p_votes=whole.p_votes,
        global_p_corrected=whole.p_corrected if are_alike(basis) else None,
        global_p_of_all=family.global_p,
        claim="",
        config=config,
        annotator=counts.annotator,
        caveat=caveat_of(basis, totals, models),
        num_names=family.num_names,
        num_comparisons=family.num_comparisons,
        average=findable(_average_share(pair.tables), totals, config, family.num_tests),
        basis=basis,
        certain=certain,
    )
    said = [replace(change, claim=sentence_of(change, bare)) for change in claimed]
    return replace(bare, changes=said, claim=claim_of(bare))


def _average_share(tables: list[Fourfold]) -> float:
    """The mean share in a of the names that either model has latents of; 0 where there are none."""
    shares = [count_a / total_a for count_a, total_a, count_b, _ in tables if total_a and count_a + count_b]
    return round(sum(shares) / len(shares), 4) if shares else 0.0


def _basis(counts: Counts, pair: Pair) -> Basis:
    if not counts.units or not counts.sides:
        return Basis()
    sides = [counts.sides[column] for column in pair.columns]
    basis = Basis(
        selected=(sides[0].num_selected, sides[1].num_selected),
        clusters=(pair.units[0].num_clusters, pair.units[1].num_clusters),
        num_votes=max(units.num_votes for units in pair.units),
        by_people=(sides[0].num_by_people, sides[1].num_by_people),
        annotators=(sides[0].annotators, sides[1].annotators),
        differing=differing(*(counts.made_with[column] for column in pair.columns)) if counts.made_with else (),
    )
    if counts.certain:
        certain = [counts.certain.sides[column].num_selected for column in pair.columns]
        without = [counts.without_interval[column] for column in pair.columns]
        return replace(basis, certain=(certain[0], certain[1]), without_interval=(without[0], without[1]))
    return basis


def _changes(names: list[str], pair: Pair, tests: list[PValues], family: Family, config: CompareConfig) -> list[Change]:
    """The changes of all names, what may be claimed of them still open."""
    resampled = bootstrap(*pair.units, len(names), config.resamples, config.confidence, config.seed)
    chances = [NAN] * len(names)
    if pair.has_both_sides:
        chances = permutation.chance_of_change(pair.observed_2C, pair.dealt_R2C)
    return [
        change_of(
            name,
            pair.tables[number],
            config,
            tests=tests[number],
            chance=chances[number],
            resampled=resampled[number],
            clusters=(pair.units[0].clusters_of(number), pair.units[1].clusters_of(number)),
            num_names=family.num_names,
            num_tests=family.num_tests,
        )
        for number, name in enumerate(names)
    ]
