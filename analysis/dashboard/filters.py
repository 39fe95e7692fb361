"""Which latents a filter lets through, in which order, and one page of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.dashboard.crosscoders import NU, Crosscoder

PAGE = 50
# What latents can be sorted by, and whether the largest come first; the most exclusive by the larger |nu| of the two.
ORDERS = {
    "most exclusive": False,
    "latent": False,
    "max_activation": True,
    "frequency": True,
    "nu_error": False,
    "nu_reconstruction": False,
}
NO_CATEGORY = "(none)"
Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Filter:
    """What is asked for; an empty part asks for nothing. `nu` bounds |nu_error| and |nu_reconstruction|."""

    owners: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    search: str = ""
    nu: tuple[Range, Range] = ((None, None), (None, None))
    by_hand: bool = False
    order: str = "most exclusive"


def matching(crosscoder: Crosscoder, wanted: Filter) -> np.ndarray:
    """The latents that the filter lets through, in its order; the lower number first among equals."""
    keep_L = np.ones(len(crosscoder.columns["latent"]), dtype=bool)
    if wanted.owners:
        keep_L &= np.isin(crosscoder.columns["owner"], wanted.owners)
    for name, (low, high) in zip(NU, wanted.nu, strict=True):
        with np.errstate(invalid="ignore"):
            size_L = np.abs(crosscoder.nu[name])
            keep_L &= True if low is None else size_L >= low
            keep_L &= True if high is None else size_L <= high
    if wanted.by_hand:
        keep_L &= np.isin(crosscoder.columns["latent"], list(crosscoder.human))
    rows = np.flatnonzero(keep_L)
    if wanted.categories or wanted.search.strip():
        rows = np.array([row for row in rows if _says(crosscoder, int(row), wanted)], dtype=np.int64)
    return rows[np.argsort(_sort_key(crosscoder, wanted.order)[rows], kind="stable")]


def _says(crosscoder: Crosscoder, latent: int, wanted: Filter) -> bool:
    if wanted.categories and (crosscoder.category(latent) or NO_CATEGORY) not in wanted.categories:
        return False
    text = crosscoder.text(latent)
    return all(word in text for word in wanted.search.casefold().split())


def _sort_key(crosscoder: Crosscoder, order: str) -> np.ndarray:
    """Ascending numbers (L,); NaN, which sorts last, for latents without a value."""
    if order == "most exclusive":
        return np.maximum(np.abs(crosscoder.nu[NU[0]]), np.abs(crosscoder.nu[NU[1]]))
    if order in NU:
        return np.abs(crosscoder.nu[order])
    values_L = crosscoder.columns[order].astype(float)
    return -values_L if ORDERS[order] else values_L


def num_pages(num_latents: int) -> int:
    """At least one, so that an empty list has a page too."""
    return max(1, math.ceil(num_latents / PAGE))


def page_of(latents: np.ndarray, page: int) -> list[int]:
    """The latents of page `page`, from 0."""
    return latents[page * PAGE : (page + 1) * PAGE].tolist()
