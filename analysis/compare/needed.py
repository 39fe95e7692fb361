"""How large a true change would have had to be to be found, in words: of one category, and of one of average size.

Found is a change whose q is below the level. That holds wherever p is below the level divided by the number of tests,
which is what is meant by "corrected for 30 tests": what is said to be found is found at least so surely.
"""

from __future__ import annotations

import math

from analysis.compare.changes import Change, Comparison
from analysis.tables import percent


def needed(change: Change, comparison: Comparison) -> str:
    """How large a change in the direction of the observed one would have had to be."""
    if not change.count_a:
        return ""
    if change.difference < 0:
        corrected, one_test = _fall(change.detectable_fall), _fall(change.one_test_fall)
    else:
        corrected = _rise(change.detectable_rise, change.power_of_doubling)
        one_test = _rise(change.one_test_rise, change.one_test_doubling)
    power = percent(comparison.config.power, 0)
    said = f" Found with {power} probability, corrected for {_tests(comparison)}, would be {corrected}"
    return f"{said} (in one uncorrected test: {one_test})."


def needed_on_average(comparison: Comparison) -> str:
    """How large a rise would have had to be for a category of average size."""
    average, found = comparison.average, f"found with {percent(comparison.config.power, 0)} probability"
    said = f" At these sizes, corrected for {_tests(comparison)},"
    if math.isinf(average.corrected.rise):
        said += f" no true rise of an average share ({percent(average.share)}) would be {found}"
    else:
        factor = f"{1 + average.corrected.rise:.1f}"
        said += f" an average share ({percent(average.share)}) would have to grow by a factor of {factor} to be {found}"
    if math.isnan(average.corrected.doubling):
        return f"{said}."
    corrected, one_test = (surely(one.doubling) for one in (average.corrected, average.one_test))
    return f"{said}; a doubling would be found with {corrected} (in one uncorrected test, with {one_test})."


def _rise(rise: float, doubling: float) -> str:
    found = "no true rise" if math.isinf(rise) else f"a true rise of {percent(rise, 0)} or more"
    return found if math.isnan(doubling) else f"{found}; a doubling, with {surely(doubling)}"


def _fall(fall: float) -> str:
    return "no true fall, not even to none" if math.isnan(fall) else f"a true fall of {percent(-fall, 0)} or more"


def surely(probability: float) -> str:
    """Whole percent; 0 and 100 would be said of what is certain."""
    if probability < 0.01:
        return f"less than {percent(0.01, 0)}"
    return f"more than {percent(0.99, 0)}" if probability > 0.99 else percent(probability, 0)


def _tests(comparison: Comparison) -> str:
    return f"{comparison.num_tests} test{'s' if comparison.num_tests > 1 else ''}"
