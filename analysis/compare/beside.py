"""Changes of the latents' shares beside changes of Elo on a leaderboard: do they go the same way?"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import numpy as np
from scipy.stats import PermutationMethod, binomtest, pearsonr, rankdata

from analysis.compare.changes import Change, Comparison
from analysis.compare.comparison_tables import name_of
from analysis.compare.leaderboard import Elo, Leaderboard
from analysis.compare.statistics import wilson
from analysis.tables import Table, interval, percent, probability, signed, stated
from extract.errors import BadInput

AGREE, DIFFER, LEVEL = "agree", "differ", "level"
# What the names of its tables begin with.
LEADERBOARD = "leaderboard"


@dataclass(frozen=True)
class Beside:
    """One leaderboard category in two models, and the category or class of the taxonomy that it is set beside.

    The interval of the difference of Elo combines those of both models as Newcombe's does for shares; NaN without.
    `elo_differs`: whether it excludes 0.
    """

    leaderboard_category: str
    style_control: bool
    elo_a: float
    elo_b: float
    elo_difference: float
    elo_difference_low: float
    elo_difference_high: float
    elo_differs: bool
    name: str
    level: str
    count_a: int
    total_a: int
    count_b: int
    total_b: int
    difference: float
    change: float
    q: float
    direction: str


def beside(board: Leaderboard, comparisons: list[Comparison]) -> list[tuple[Table, str]]:
    """For each two compared models that the leaderboard has, a table and a sentence on what it shows."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        pairs.setdefault((comparison.model_a, comparison.model_b), []).append(comparison)
    found = {pair: rows_of(board, *pair, levels) for pair, levels in pairs.items()}
    if pairs and not any(found.values()):
        raise BadInput(_nothing(board, list(pairs)))
    said = {pair: _claim(rows, *pair, comparisons[0].config.confidence) for pair, rows in found.items() if rows}
    return [(_table(found[pair], *pair, claim), claim) for pair, claim in said.items()]


def has_pair(board: Leaderboard, model_a: str, model_b: str) -> bool:
    """Whether some category rates both models."""
    return any(model_a in rated and model_b in rated for rated in board.ratings.values())


def rows_of(board: Leaderboard, model_a: str, model_b: str, levels: list[Comparison]) -> list[Beside]:
    """The categories that rate both models and stand beside a name of the taxonomy."""
    changes = {change.name: (one.level, change) for one in levels for change in one.changes}
    return [
        _row(category, style, rated[model_a], rated[model_b], *changes[board.name_of[category]])
        for (category, style), rated in board.ratings.items()
        if model_a in rated and model_b in rated and board.name_of.get(category) in changes
    ]


def _nothing(board: Leaderboard, pairs: list[tuple[str, str]]) -> str:
    compared = list(dict.fromkeys(model for pair in pairs for model in pair))
    if not any(has_pair(board, *pair) for pair in pairs):
        return (
            f"leaderboard ({board.path}) rates {', '.join(board.models)}, and no category two of the compared models "
            f"({', '.join(compared)}). Name its models as the study does."
        )
    return (
        f"leaderboard ({board.path}): none of {', '.join(board.categories)} stands beside a compared category. Name "
        "one in the column taxonomy, or by leaderboard_map."
    )


def _row(category: str, style: bool, a: Elo, b: Elo, level: str, change: Change) -> Beside:
    below, above = math.hypot(b.value - b.low, a.high - a.value), math.hypot(b.high - b.value, a.value - a.low)
    elo = b.value - a.value
    low, high = elo - below, elo + above
    both = elo * change.difference
    direction = AGREE if both > 0 else DIFFER if both < 0 else LEVEL
    return Beside(
        *(category, style, a.value, b.value, elo, low, high, low > 0 or high < 0),
        *(change.name, level, change.count_a, change.total_a, change.count_b, change.total_b),
        *(change.difference, change.change, change.q, direction),
    )


def _table(rows: list[Beside], a: str, b: str, said: str) -> Table:
    printed = [
        [
            row.leaderboard_category,
            "yes" if row.style_control else "no",
            f"{row.elo_a:.0f}",
            f"{row.elo_b:.0f}",
            signed(row.elo_difference, 0),
            *_printed_interval(row),
            row.name,
            f"{row.count_a}/{row.total_a}",
            f"{row.count_b}/{row.total_b}",
            signed(100 * row.difference, 1),
            probability(row.q),
            row.direction,
        ]
        for row in rows
    ]
    elo = [f"Elo {a}", f"Elo {b}", "difference", "interval", "differs"]
    return Table(
        name=name_of(LEADERBOARD, a, b),
        caption=f"Elo of {a} and {b} in categories of a leaderboard, the difference with its interval, and whether "
        f"that excludes 0; beside it a category or class of the taxonomy, the latents of {a} and {b} in it, the "
        "difference of their shares in points with q, and whether both differences have the same sign.",
        columns=[field.name for field in fields(Beside)],
        raw=[list(astuple(row)) for row in rows],
        heading=["leaderboard", "style control", *elo, "taxonomy", a, b, "points", "q", "directions"],
        printed=printed,
        note=said,
    )


def _printed_interval(row: Beside) -> tuple[str, str]:
    if math.isnan(row.elo_difference_low):
        return "–", "–"
    return interval(row.elo_difference_low, row.elo_difference_high, 0), "yes" if row.elo_differs else "no"


def _claim(rows: list[Beside], a: str, b: str, confidence: float) -> str:
    """Agreement of directions and ranks without and with style control, and what it is worth."""
    parts = [
        _agreement([row for row in rows if row.style_control == style], style, confidence)
        for style in (False, True)
        if any(row.style_control == style for row in rows)
    ]
    num = len({row.leaderboard_category for row in rows})
    return (
        f"{' '.join(parts)} May not be claimed: that latents explain the Elo of {a} or {b}. The evidence is {num} "
        f"{'category' if num == 1 else 'categories'}, which share latents and votes and stand side by side by choice, "
        "and a share of latents measures no ability."
    )


def _agreement(rows: list[Beside], style: bool, confidence: float) -> str:
    """Directions by a binomial test, ranks by Spearman's correlation with a permutation test."""
    decided = [row for row in rows if row.direction != LEVEL]
    agree = sum(row.direction == AGREE for row in decided)
    which = "With style control" if style else "Without style control"
    if not decided:
        return f"{which} no category changes in both."
    low, high = wilson(agree, len(decided), confidence)
    share = f"{percent(low, 0)} to {percent(high, 0)}, {stated('p', float(binomtest(agree, len(decided)).pvalue))}"
    said = f"{which} {agree} of {len(decided)} categories change in the direction of Elo ({share})"
    differ = [row.direction == AGREE for row in decided if row.elo_differs]
    certain = f"{sum(differ)} of {len(differ)}" if differ else "none"
    return f"{said}; of those where the interval of Elo's difference excludes 0, {certain}{_ranks(rows)}."


def _ranks(rows: list[Beside]) -> str:
    elo, shares = rankdata([row.elo_difference for row in rows]), rankdata([row.difference for row in rows])
    if len(rows) < 3 or not elo.std() or not shares.std():
        return ""
    method = PermutationMethod(n_resamples=9_999, rng=np.random.default_rng(0))
    found = pearsonr(elo, shares, method=method)
    return f"; rank correlation {signed(float(found.statistic), 2)} ({stated('p', float(found.pvalue))})"
