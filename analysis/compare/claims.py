"""What may be claimed from a comparison, and what not, in plain words: a sentence or two per category, and over all.

A difference of a category may be claimed if q < 1 - confidence, with near-duplicates counted as the independent latents
that they are not and with clusters of them permuted whole, the bootstrap interval over clusters and votes excludes no
difference, and the latents of both were selected alike and put into their categories by the same annotators, models and
people alike. Whether it may be claimed of the certain latents alone too, those whose intervals of nu cross no
threshold, is said beside it. That the models differ as a whole may be claimed by one permutation test over all
categories, or over classes where nothing is known of categories: by the vote with the largest p, after Holm's
correction for the comparisons, of models whose latents were selected and named alike.
"""

from __future__ import annotations

import math

from analysis.compare.changes import Basis, Change, Comparison
from analysis.compare.needed import needed, needed_on_average
from analysis.compare.selected import spoken
from analysis.tables import interval, percent, probability, signed, stated

PLURAL = {"category": "categories", "class": "classes"}


def same_annotators(basis: Basis) -> bool:
    """Whether the categories of both models come from the same annotators, people included; nothing is known of counts
    alone, and both sets empty.
    """
    first, second = basis.annotators
    return first == second


def are_alike(basis: Basis) -> bool:
    """Whether the latents of both models were selected, described and put into categories in the same way."""
    return same_annotators(basis) and not basis.differing


def may_be_claimed(change: Change, basis: Basis, alpha: float) -> bool:
    """Whether that one model has more of this category may be said."""
    excludes_none = change.bootstrap_difference_low > 0 or change.bootstrap_difference_high < 0
    return change.q < alpha and change.q_clusters < alpha and excludes_none and are_alike(basis)


def holds_of_certain(change: Change, comparison: Comparison) -> bool:
    """Whether what may be claimed of all latents may be claimed of the certain ones alone."""
    alone = comparison.among_certain(change)
    return alone is not None and alone.may_be_claimed and alone.difference * change.difference > 0


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
            f"{b} is {'better' if change.difference > 0 else 'worse'} at it.{_of_certain(change, comparison)}"
        )
    reason = ""
    if change.q < comparison.config.alpha:
        reason = f" In spite of its q: {_why_not(comparison.basis)}"
    return f"May not be claimed: that {b} has more or less of it ({numbers}).{reason}{needed(change, comparison)}"


def _numbers(change: Change) -> str:
    """The counts, the change with its interval, and the tests."""
    counts = f"{change.count_b} of {change.total_b} against {change.count_a} of {change.total_a}"
    return (
        f"{counts}, {signed(100 * change.change)}\u00a0% {interval(change.change_low, change.change_high, 0, 100)}, "
        f"{stated('p', change.p)}, {stated('q', change.q)}"
    )


def _of_certain(change: Change, comparison: Comparison) -> str:
    """Whether a claim rests on latents that might have been selected otherwise."""
    alone = comparison.among_certain(change)
    if alone is None:
        return ""
    numbers = f"{alone.count_b} of {alone.total_b} against {alone.count_a} of {alone.total_a}, {stated('q', alone.q)}"
    if holds_of_certain(change, comparison):
        return f" It may be claimed of the certain latents alone too ({numbers})."
    return f" It depends on uncertain latents: of the certain ones alone ({numbers}) it may not be claimed."


def _why_not(basis: Basis) -> str:
    if not same_annotators(basis):
        return "different annotators named the latents of the two models."
    if basis.differing:
        return "the latents of the two models were not selected and named alike."
    return "with near-duplicates kept together, or other votes, the latents are compatible with no difference."


def claim_of(comparison: Comparison) -> str:
    """What may be claimed over all categories, and what not."""
    a, b, basis = comparison.model_a, comparison.model_b, comparison.basis
    total_a, total_b = comparison.totals
    if not total_a or not total_b:
        return (
            f"Nothing can be compared: {a} has {_latents(total_a, basis, 0)} and {b} has {_latents(total_b, basis, 1)}."
        )
    if not same_annotators(basis):
        first, second = (" and ".join(spoken(annotators)) for annotators in basis.annotators)
        second = second.replace("people", "other people") if first == second else second
        return (
            f"Nothing may be claimed: the latents of {a} were named by {first}, those of {b} by {second}, and shares "
            "differ between annotators as well as between models. Annotate both models alike."
        )
    if basis.differing:
        return (
            f"Nothing may be claimed: the latents of {a} and {b} were not selected and named alike "
            f"({'; '.join(basis.differing)}), and shares differ with that as well as between models. Run `python -m "
            "analysis` with the same settings for both."
        )
    if any(change.may_be_claimed for change in comparison.changes):
        return _positive(comparison)
    smallest = min((change.q for change in comparison.changes), default=1.0)
    return (
        f"No {comparison.level} differs significantly between {_sizes(comparison)} "
        f"(smallest {stated('q', smallest)}, {_corrected(comparison)}). {_overall(comparison)} The counts may be "
        f"reported; that {b} has more or less of any {comparison.level} may not be claimed."
        f"{_fragile(comparison)}{_by_chance(comparison)}{needed_on_average(comparison)}"
    )


def _latents(total: int, basis: Basis, side: int) -> str:
    selected = basis.selected[side] if basis.selected else 0
    lost = f" that are in a category (of {selected} selected)" if selected > total else ""
    return f"{total} latents of its own{lost}"


def _positive(comparison: Comparison) -> str:
    b = comparison.model_b
    named = "; ".join(
        f"{change.name} {'more' if change.difference > 0 else 'less'} frequent in {b} ({change.count_a} of "
        f"{change.total_a} against {change.count_b} of {change.total_b}, {stated('q', change.q)}"
        f"{_among_certain(change, comparison)})"
        for change in comparison.changes
        if change.may_be_claimed
    )
    return (
        f"May be claimed ({_corrected(comparison)}): {named}. May not be claimed: any other difference between "
        f"{_sizes(comparison)}.{_fragile(comparison)} {_overall(comparison)}"
    )


def _among_certain(change: Change, comparison: Comparison) -> str:
    if not comparison.certain:
        return ""
    return ", of certain latents too" if holds_of_certain(change, comparison) else ", depending on uncertain latents"


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
    """The global test: of the categories where there are any, and of all of them or not at all."""
    names, p = PLURAL[comparison.level], stated("p", comparison.global_p)
    unknown = comparison.num_names - len(comparison.changes)
    if unknown:
        return (
            f"Over these {len(comparison.changes)} {names} and all other latents as one: {p}, from which nothing may "
            f"be claimed, {unknown} {names} being unknown."
        )
    rest_a, rest_b = comparison.unclassified
    said = f"Over all {names} at once, the {rest_a} and {rest_b} latents in none of them included: {p}"
    if comparison.global_p_of_all is not None:
        said += f" ({stated('p', comparison.global_p_of_all)} that all compared models are alike)"
    if comparison.global_p_corrected is None:
        return f"{said}; whether the models differ as a whole is tested once, on the categories."
    said += _corrected_whole(comparison, comparison.global_p_corrected)
    if not comparison.differs_as_a_whole:
        return f"{said}, so that a difference as a whole may not be claimed."
    return f"{said}, so that a difference as a whole may be claimed{_whole_of_certain(comparison)}."


def _corrected_whole(comparison: Comparison, corrected: float) -> str:
    """What the claim rests on where it is not p itself."""
    votes = ""
    if comparison.global_p_votes > comparison.global_p:
        votes = f", {stated('p', comparison.global_p_votes)} by other votes"
    if comparison.num_comparisons == 1:
        return votes
    number = comparison.num_comparisons
    return f"{votes}, {stated('p', corrected)} after Holm's correction for {number} comparisons"


def _whole_of_certain(comparison: Comparison) -> str:
    if not comparison.certain:
        return ""
    p = stated("p", comparison.certain.global_p)
    if comparison.certain.differs_as_a_whole:
        return f", of the certain latents alone too ({p})"
    return f", but depends on uncertain latents (of the certain ones alone {p})"


def _fragile(comparison: Comparison) -> str:
    """Categories whose q alone would allow a claim."""
    alpha = comparison.config.alpha
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


def caveat_of(basis: Basis, totals: tuple[int, int], models: tuple[str, str]) -> str:
    """What the numbers rest on, and what they leave out."""
    if basis.clusters is None:
        unknown = "Near-duplicates and repeated annotations are unknown from counts alone, so that intervals may be"
        return f"{unknown} too narrow. {_OF_SELECTED}"
    sentences = [_placed(basis, totals, models), _votes(basis)]
    if basis.selected and sum(basis.clusters) < sum(basis.selected):
        clusters = f"The selected latents form {basis.clusters[0]} and {basis.clusters[1]} clusters of near-duplicates"
        sentences.append(f"{clusters}, which permutations and resamples keep whole.")
    if basis.certain and basis.selected:
        sentences.append(_certain(basis.certain, basis.selected, basis.without_interval))
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


def _certain(certain: tuple[int, int], selected: tuple[int, int], without_interval: tuple[int, int]) -> str:
    return (
        f"Certain, with both whole intervals of ν within the thresholds, are {certain[0]} of {selected[0]} and "
        f"{certain[1]} of {selected[1]} selected latents; {without_interval[0]} and {without_interval[1]} have no "
        "interval and count as not certain."
    )


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
