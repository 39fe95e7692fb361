"""One table of all comparisons of a study or file: what stands in their claims and caveats, as numbers in a file."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.compare.changes import Comparison
from analysis.compare.needed import surely
from analysis.compare.selected import spoken
from analysis.tables import Table, Value, probability

COMPARISONS = "comparisons"


def comparisons_table(comparisons: list[Comparison]) -> Table:
    """A row for each comparison and level, and one for its certain latents alone."""
    kinds = [(one, kind) for whole in comparisons for one, kind in ((whole, "selected"), (whole.certain, "certain"))]
    rows = [numbers_of(one, kind) for one, kind in kinds if one]
    return Table(
        name=COMPARISONS,
        caption="Comparisons of models by all their classes or categories at once: latents of both, p that both "
        "distribute them alike, that p after Holm's correction for all comparisons where it is tested, names that may "
        "be claimed to differ, and the probability with which a doubling of an average share would be found after the "
        "correction for all tests.",
        columns=list(rows[0]),
        raw=[list(row.values()) for row in rows],
        heading=["level", "a", "b", "latents", "of a", "of b", "p", "corrected", "claimed", "doubling"],
        printed=[
            [
                *(one.level, one.model_a, one.model_b, kind, *map(str, one.totals), probability(one.global_p)),
                "–" if one.global_p_corrected is None else probability(one.global_p_corrected),
                str(sum(change.may_be_claimed for change in one.changes)),
                surely(one.average.corrected.doubling),
            ]
            for one, kind in kinds
            if one
        ],
    )


def numbers_of(comparison: Comparison, latents: str) -> dict[str, Value]:
    """The numbers of a comparison of these latents that are of no single category, and what is said of them.

    `in_none_*`: latents in none of the names. `global_p_corrected`: None where nothing is claimed of it. `average_*`:
    what could be found of a category of the mean share in a, after the correction and by one uncorrected test.
    """
    basis, average, config = comparison.basis, comparison.average, comparison.config
    return {
        "level": comparison.level,
        **_sides("model", (comparison.model_a, comparison.model_b)),
        "latents": latents,
        **_sides("total", comparison.totals),
        **_sides("in_none", comparison.unclassified),
        **_sides("selected", basis.selected or (None, None)),
        **_sides("clusters", basis.clusters or (None, None)),
        **_sides("certain", basis.certain or (None, None)),
        **_sides("without_interval", basis.without_interval if basis.certain else (None, None)),
        **_sides("by_people", basis.by_people),
        **_sides("annotators", ["; ".join(spoken(names)) for names in basis.annotators]),
        "num_votes": basis.num_votes,
        "num_names": comparison.num_names,
        "num_comparisons": comparison.num_comparisons,
        "num_claimed": sum(change.may_be_claimed for change in comparison.changes),
        "global_p": comparison.global_p,
        "global_p_votes": comparison.global_p_votes,
        "global_p_corrected": comparison.global_p_corrected,
        "global_p_of_all": comparison.global_p_of_all,
        "average_share": average.share,
        "average_rise": average.corrected.rise,
        "average_doubling": average.corrected.doubling,
        "average_one_test_rise": average.one_test.rise,
        "average_one_test_doubling": average.one_test.doubling,
        **{name: getattr(config, name) for name in ("confidence", "power", "label_error", "resamples", "seed")},
        "claim": comparison.claim,
        "caveat": comparison.caveat,
    }


def _sides(name: str, values: Sequence[Value]) -> dict[str, Value]:
    return {f"{name}_{side}": value for side, value in zip("ab", values, strict=True)}
