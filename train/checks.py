"""What a setting may be: each check names the setting, its value and the remedy in a BadInput."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from extract.errors import BadInput


def positive(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise BadInput(f"{section}.{name}={value} must be greater than 0.")


def not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise BadInput(f"{section}.{name}={value} must not be negative.")


def share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise BadInput(f"{name}={value} must be at least 0 and less than 1.")


def choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
        raise BadInput(f"{name}={value} is not one of {', '.join(choices)}. Did you mean {nearest}?")


def multiple(name: str, value: int, of: int, what: str) -> None:
    """`what` says what the number `of` is."""
    if value % of:
        below, above = value // of * of, -(-value // of) * of
        nearest = f"{below} or {above}" if below else f"{above}"
        raise BadInput(f"{name}={value} must be a multiple of {what}={of}. Nearest: {nearest}.")
