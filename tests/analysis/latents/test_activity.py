"""Counts of activations by hand; `test_latent_pass` compares those of a whole pass with dense ones."""

from __future__ import annotations

import numpy as np

from analysis.firings.firings import DocumentFirings
from analysis.firings.token_kinds import TokenKinds
from analysis.latents.activity import Activity


def test_the_outer_bins_of_a_histogram_hold_what_lies_beyond() -> None:
    """Of latent 0 alone, from 2^-12 to 2^12: what lies below, inside, on the last edge and above."""
    activity = Activity(2, TokenKinds([], np.zeros(0, np.uint8), ["tests"], np.zeros(1, np.int64)))
    values = np.array([2.0**-20, 2.0**-12, 1.5, 2.0**12, 2.0**30], dtype=np.float32)
    firings = DocumentFirings.adjacent(np.zeros(5, int), np.zeros(5, int), np.arange(5), values)
    activity.add(firings, np.zeros(5, dtype=np.uint8), 5)
    assert {bin: count for bin, count in enumerate(activity.histogram[0].tolist()) if count} == {0: 2, 12: 1, 23: 2}
    assert not activity.histogram[1].any()
