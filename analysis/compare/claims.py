"""What may be claimed from a comparison, and what not, in plain words: a sentence or two per category, and over all.

A difference of a category may be claimed if q < 1 - confidence, with near-duplicates counted as the independent latents
that they are not and with clusters of them permuted whole, the bootstrap interval over clusters and votes excludes no
difference, and the same annotators, models and people alike, put the latents of both into their categories.
"""

from __future__ import annotations

import math

from analysis.compare import power
from analysis.compare.changes import Basis, Change, Comparison
from analysis.tables import interval, percent, probability, signed, stated

PLURAL = {"category": "categories", "class": "classes"}


def same_annotators(basis: Basis) -> bool:
    """Whether the categories of both models come from the same annotators, people included; nothing is known of counts
    alone, and both sets empty.
    """
    first, second = basis.annotators
    return first == second


def may_be_claimed(change: Change, basis: Basis, alpha: float) -> bool:
    """Whether that one model has more of this category may be said."""
    excludes_none = change.bootstrap_difference_low > 0 or change.bootstrap_difference_high < 0
    return change.q < alpha and change.q_clusters < alpha and excludes_none and same_annotators(basis)


def sentence_of(change: Change, comparison: Comparison) -> str:
    """What may be said of one category."""
    if not change.total_a or not change.total_b:
        return "Nothing can be compared: one model has no latents."
    if not change.count_a + change.count_b:
        highest = f"up to {percent(change.share_a_high)} and {percent(change.share_b_high)}"
        return f"Nothing may be claimed: no latent of either model, which {highest} of all such latents could still be."
    b, numbers = comparison.model_b, _numbers(change)
    if change.may_be_claimed:
        more = "larger" if change.difference > 0 else "smaller"
        points = interval(change.difference_low, change.difference_high, 1, 100)
        return (
            f"May be claimed: the share of {b} is {more} ({numbers}). Not how much, but for {points} points, nor that "
            f"{b} is {'better' if change.difference > 0 else 'worse'} at it."
        )
    reason = ""
    if change.q < comparison.alpha:
        reason = f" In spite of its q: {_why_not(comparison.basis)}"
    return f"May not be claimed: that {b} has more or less of it ({numbers}).{reason}{_needed(change, comparison)}"


def _numbers(change: Change) -> str:
    """The counts, the change with its interval, and the tests."""
    counts = f"{change.count_b} of {change.total_b} against {change.count_a} of {change.total_a}"
    return (
        f"{counts}, {signed(100 * change.change)}\u00a0% {interval(change.change_low, change.change_high, 0, 100)}, "
        f"{stated('p', change.p)}, {stated('q', change.q)}"
    )


def _why_not(basis: Basis) -> str:
    if not same_annotators(basis):
        return "different annotators named the latents of the two models."
    return "with near-duplicates kept together, or other votes, the latents are compatible with no difference."


def _needed(change: Change, comparison: Comparison) -> str:
    """How large a change in that direction would have had to be."""
    found = f"with {percent(comparison.power, 0)} probability"
    if not change.count_a:
        return ""
    if change.difference < 0:
        if math.isnan(change.detectable_fall):
            return f" Not even its absence from the latents of {comparison.model_b} would have been found {found}."
        return f" Found {found} would be a fall of {percent(-change.detectable_fall, 0)} or more."
    if math.isinf(change.detectable_rise):
        return f" No rise of its share would have been found {found}."
    doubling = percent(change.power_of_doubling, 0)
    return (
        f" Found {found} would be a rise of {percent(change.detectable_rise, 0)} or more; a doubling, with {doubling}."
    )


def claim_of(comparison: Comparison) -> str:
    """What may be claimed over all categories, and what not."""
    a, b, basis = comparison.model_a, comparison.model_b, comparison.basis
    total_a, total_b = comparison.totals
    if not total_a or not total_b:
        return (
            f"Nothing can be compared: {a} has {_latents(total_a, basis, 0)} and {b} has {_latents(total_b, basis, 1)}."
        )
    if not same_annotators(basis):
        first, second = (" and ".join(sorted(annotators)) for annotators in basis.annotators)
        return (
            f"Nothing may be claimed: the latents of {a} were named by {first}, those of {b} by {second}, and shares "
            "differ between annotators as well as between models. Annotate both models alike."
        )
    if any(change.may_be_claimed for change in comparison.changes):
        return _positive(comparison)
    smallest = min((change.q for change in comparison.changes), default=1.0)
    return (
        f"No {comparison.level} differs significantly between {_sizes(comparison)} "
        f"(smallest {stated('q', smallest)}, {_corrected(comparison)}). {_overall(comparison)} The counts may be "
        f"reported; that {b} has more or less of any {comparison.level} may not be claimed."
        f"{_fragile(comparison)}{_by_chance(comparison)}{_power(comparison)}"
    )


def _latents(total: int, basis: Basis, side: int) -> str:
    selected = basis.selected[side] if basis.selected else 0
    lost = f" that are in a category (of {selected} selected)" if selected > total else ""
    return f"{total} latents of its own{lost}"


def _positive(comparison: Comparison) -> str:
    b = comparison.model_b
    named = "; ".join(
        f"{change.name} {'more' if change.difference > 0 else 'less'} frequent in {b} ({change.count_a} of "
        f"{change.total_a} against {change.count_b} of {change.total_b}, {stated('q', change.q)})"
        for change in comparison.changes
        if change.may_be_claimed
    )
    return (
        f"May be claimed ({_corrected(comparison)}): {named}. May not be claimed: any other difference between "
        f"{_sizes(comparison)}.{_fragile(comparison)} {_overall(comparison)}"
    )


def _sizes(comparison: Comparison) -> str:
    total_a, total_b = comparison.totals
    return f"{total_a} latents of {comparison.model_a} and {total_b} of {comparison.model_b}"


def _corrected(comparison: Comparison) -> str:
    tests = f"{comparison.num_names} {PLURAL[comparison.level]}"
    if comparison.num_comparisons > 1:
        number = comparison.num_names * comparison.num_comparisons
        tests = f"{number} tests: {tests} in {comparison.num_comparisons} comparisons"
    return f"Fisher exact tests corrected for {tests}"


def _overall(comparison: Comparison) -> str:
    rest_a, rest_b = comparison.unclassified
    of_all = ""
    if comparison.global_p_of_all is not None:
        of_all = f" ({stated('p', comparison.global_p_of_all)} that all compared models are alike)"
    overall = f"Over all {PLURAL[comparison.level]} at once, the {rest_a} and {rest_b} latents in none of them included"
    may = "may" if comparison.global_p < comparison.alpha else "may not"
    return f"{overall}: {stated('p', comparison.global_p)}{of_all}, so that a difference as a whole {may} be claimed."


def _fragile(comparison: Comparison) -> str:
    """Categories whose q alone would allow a claim."""
    alpha = comparison.alpha
    names = [change.name for change in comparison.changes if change.q < alpha and not change.may_be_claimed]
    if not names:
        return ""
    return f" That goes for {', '.join(names)} too, in spite of a q below {alpha:g}: {_why_not(comparison.basis)}"


def _by_chance(comparison: Comparison) -> str:
    """How little the largest rise means."""
    rises = [c for c in comparison.changes if 0 < c.change < math.inf and not math.isnan(c.chance)]
    if not rises:
        return ""
    largest = max(rises, key=lambda change: change.change)
    unknown = comparison.num_names - len(comparison.changes)
    more = f" or more, {unknown} {PLURAL[comparison.level]} being unknown" if unknown else ""
    return (
        f" Were both models alike, chance alone would make some {comparison.level} rise at least as much as "
        f"{largest.name} ({largest.count_a} to {largest.count_b} latents, {signed(100 * largest.change)}\u00a0%) with "
        f"probability {probability(largest.chance)}{more}."
    )


def _power(comparison: Comparison) -> str:
    """How large a change would have had to be to be found, for a category of average size."""
    total_a, total_b = comparison.totals
    counts = [change.count_a for change in comparison.changes if change.count_a + change.count_b]
    typical = round(sum(counts) / len(counts) / total_a, 4) if counts else 0.0
    alpha, found = comparison.alpha, f"with {percent(comparison.power, 0)} probability"
    rise = power.detectable_rise(typical, total_a, total_b, comparison.power, alpha)
    if math.isinf(rise):
        return f" At these sizes no true rise of an average share would be found {found}."
    doubled = power.power(typical, min(1.0, 2 * typical), total_a, total_b, alpha)
    return (
        f" At these sizes an average share ({percent(typical)}) would have to grow by a factor of {1 + rise:.1f} to be "
        f"found {found} in a single uncorrected test; a doubling would be found with {percent(doubled, 0)}."
    )


def caveat_of(basis: Basis, totals: tuple[int, int], models: tuple[str, str]) -> str:
    """What the numbers rest on, and what they leave out."""
    if basis.clusters is None:
        unknown = "Near-duplicates and repeated annotations are unknown from counts alone, so that intervals may be"
        return f"{unknown} too narrow. {_OF_SELECTED}"
    sentences = [_placed(basis, totals, models), _votes(basis)]
    if basis.selected and sum(basis.clusters) < sum(basis.selected):
        clusters = f"The selected latents form {basis.clusters[0]} and {basis.clusters[1]} clusters of near-duplicates"
        sentences.append(f"{clusters}, which permutations and resamples keep whole.")
    if any(basis.by_people):
        sentences.append(_people(basis.by_people, totals))
    return " ".join([*sentences, _OF_SELECTED])


_OF_SELECTED = (
    "Shares are of the latents selected as a model's own: they say nothing about its other latents, nor about how well "
    "it does anything."
)


def _placed(basis: Basis, totals: tuple[int, int], models: tuple[str, str]) -> str:
    selected = basis.selected or totals
    numbers = zip(totals, selected, models, strict=True)
    placed = (f"{total} of {number} selected latents of {model}" for total, number, model in numbers)
    return f"Compared are the placed ones: {' and '.join(placed)}."


def _people(by_people: tuple[int, int], totals: tuple[int, int]) -> str:
    shares = [count / total if total else 0.0 for count, total in zip(by_people, totals, strict=True)]
    first, second = (f"{count} ({percent(share, 0)})" for count, share in zip(by_people, shares, strict=True))
    said = f"People put {first} and {second} of them into their categories"
    if shares[0] == shares[1]:
        return f"{said}."
    return f"{said}: how far they judge unlike the annotators is in the difference, and in no interval."


def _votes(basis: Basis) -> str:
    if basis.num_votes > 1:
        return f"A latent has up to {basis.num_votes} votes, of which each bootstrap resample draws one."
    return "Each latent has one vote, so that what another annotation would change is in no interval."
