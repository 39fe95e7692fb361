"""Drawing documents: uniform, in strata, the same in every process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from analysis.examples.samples import Samples, hashes, strata
from analysis.firings.config import ExamplesConfig
from analysis.firings.firings import DocumentFirings

NUM_LATENTS, NUM_DOCUMENTS = 400, 120
CONFIG = ExamplesConfig(num_quantiles=4, samples_per_quantile=5, num_silent=10, num_near_miss=0)


def drawn(config: ExamplesConfig = CONFIG, chunk: int = 17) -> dict[str, np.ndarray]:
    """(latent, document, maximum) rows by kind: every latent fires on even documents, the stronger the later."""
    reading: Any = SimpleNamespace(kept_n=np.ones(NUM_DOCUMENTS), is_first_n=np.ones(NUM_DOCUMENTS, dtype=bool))
    samples = Samples(np.ones(NUM_LATENTS, dtype=bool), reading, config)
    for start in range(0, NUM_DOCUMENTS, chunk):
        documents = np.arange(start, min(start + chunk, NUM_DOCUMENTS))
        documents = documents[documents % 2 == 0]
        latent_n, document_n = (column.ravel() for column in np.meshgrid(np.arange(NUM_LATENTS), documents))
        samples.add(DocumentFirings.group(document_n, np.zeros_like(document_n), latent_n, document_n + 1.0))
    found = samples.result()
    kinds = np.array(found.kind_g)
    columns = (found.firings.latent_g, found.firings.document_g, found.quantile_g)
    return {kind: np.stack([column[kinds == kind] for column in columns]) for kind in ("activating", "silent")}


@pytest.mark.parametrize(("kind", "each"), [("activating", 20), ("silent", 10)])
def test_every_document_of_a_kind_is_drawn_equally_often(kind: str, each: int) -> None:
    """400 latents draw from 60 documents."""
    latent_g, document_g, _ = drawn()[kind]
    assert np.bincount(latent_g).tolist() == [each] * NUM_LATENTS
    counts = np.bincount(document_g, minlength=NUM_DOCUMENTS)
    wanted = np.arange(NUM_DOCUMENTS) % 2 == (0 if kind == "activating" else 1)
    assert not counts[~wanted].any()
    # Draws without replacement vary less than a multinomial: neither too uneven nor suspiciously even.
    p = chisquare(counts[wanted]).pvalue
    assert p > 1e-3
    assert counts[wanted].std() > 0.5 * (NUM_LATENTS * each / 60 * (1 - each / 60)) ** 0.5


def test_different_latents_draw_different_documents() -> None:
    latent_g, document_g, _ = drawn()["activating"]
    sets = [frozenset(document_g[latent_g == latent].tolist()) for latent in range(NUM_LATENTS)]
    overlap = np.mean([len(a & b) for a, b in zip(sets, sets[1:], strict=False)])
    assert overlap == pytest.approx(20 * 20 / 60, rel=0.1)  # as of independent draws


def test_strata_are_quantiles_of_the_draw() -> None:
    latent_g, document_g, quantile_g = drawn()["activating"]
    for latent in range(0, NUM_LATENTS, 50):
        mine = latent_g == latent
        order = document_g[mine].argsort()  # the maximum rises with the document
        assert quantile_g[mine][order].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    np.testing.assert_array_equal(strata(np.array([7, 7, 7, 7, 7, 9]), 2), [0, 0, 0, 1, 1, 0])


def test_draws_depend_on_the_seed_alone() -> None:
    for kind, rows in drawn().items():
        np.testing.assert_array_equal(rows, drawn(chunk=5)[kind])
    other = ExamplesConfig(num_quantiles=4, samples_per_quantile=5, num_silent=10, num_near_miss=0, seed=1)
    assert not np.array_equal(drawn(other)["activating"], drawn()["activating"])


def test_hashes_are_uniform_and_stay_what_they_are() -> None:
    latent, document = (column.ravel() for column in np.meshgrid(np.arange(100), np.arange(100)))
    found = hashes(latent, document, 0)
    assert kstest(found, "uniform").pvalue > 1e-3 and len(np.unique(found)) == 10_000
    assert abs(np.corrcoef(found.reshape(100, 100)).mean() - 0.01) < 0.01  # rows are not alike
    assert not np.array_equal(found, hashes(document, latent, 0))
