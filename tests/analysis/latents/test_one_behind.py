"""A thread that follows one call behind: order, waiting, errors."""

import threading

import pytest

from analysis.latents.one_behind import OneBehind


def test_calls_run_beside_the_caller_in_their_order() -> None:
    """The first call ends only when the caller, who did not wait for it, lets it."""
    behind, goes_on, seen = OneBehind(), threading.Event(), []

    def first() -> None:
        assert goes_on.wait(10)
        seen.append("first")

    behind.submit(first)
    assert not seen
    goes_on.set()
    behind.submit(lambda: seen.append("second"))
    assert seen[0] == "first"
    behind.wait()
    assert seen == ["first", "second"]


@pytest.mark.parametrize("then", ["submit", "wait"])
def test_an_error_is_raised_once_by_what_comes_next(then: str) -> None:
    behind, seen = OneBehind(), []
    behind.submit(lambda: [][0])
    with pytest.raises(IndexError):
        behind.submit(lambda: seen.append("never")) if then == "submit" else behind.wait()
    behind.wait()
    assert not seen
