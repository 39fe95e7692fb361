"""Which latents maxima are kept of, which are the null of shared ones, and what the small tables count."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from analysis.config import AnalysisSettings
from analysis.latents.outputs import shared_null
from analysis.latents.scaling import decoder_gram
from analysis.latents.step import owned_and_sampled, write_latents
from analysis.latents.table import Scaling
from tests.analysis.latents.test_latents import D, crosscoder_for
from tests.analysis.random_study import MODELS, make_study


def test_document_maxima_are_kept_of_sets_of_models_too() -> None:
    norms = {0: (0.0, 1.0, 1.0), 1: (1.0, 1.0, 1.0), 2: (0.0, 0.0, 1.0), 3: (0.7, 1.0, 0.0)}
    crosscoder = crosscoder_for(norms, models=["a", "b", "c"])
    config = AnalysisSettings().analysis
    gram = decoder_gram(crosscoder.W_dec.detach().view(4, 3, D))
    owned_L, sampled_L = owned_and_sampled(crosscoder, gram, config)
    assert owned_L.tolist() == [True, False, True, False] and sampled_L.all()
    config.examples.sampled = "held"
    assert owned_and_sampled(crosscoder, gram, config)[1].tolist() == owned_L.tolist()


def test_dedicated_latents_are_no_shared_ones_whatever_their_norms() -> None:
    """The null of latents that both models share: not those that one was given, nor those of unlike norms."""
    crosscoder = crosscoder_for({0: (1.0, 1.0), 1: (1.0, 1.0), 2: (1.0, 0.0), 3: (1.0, 0.95)})
    crosscoder.dedicated_owner[1] = 0
    gram = decoder_gram(crosscoder.W_dec.detach().view(4, 2, D))
    nu_error, nu_recons = (place + np.arange(4.0)[:, None, None] * np.ones((4, 2, 2)) for place in (0, 10))
    null = shared_null(Scaling(gram, (nu_error, nu_recons), np.zeros(0)), crosscoder, AnalysisSettings().analysis.owner)
    assert null.name == "shared"
    assert [values[:, 0, 1].tolist() for values in null.values] == [[0, 3], [10, 13]]


def test_the_configured_rules_count_what_the_table_says(tmp_path: Path) -> None:
    """A quarter of the latents is dedicated to each model."""
    write_latents(make_study(tmp_path), tmp_path / "crosscoder", tmp_path / "analysis")
    table = pq.read_table(tmp_path / "analysis" / "latents.parquet")
    owner_L, is_dedicated_L = np.array(table["owner"].to_pylist()), table["dedicated"].to_numpy()
    with (tmp_path / "analysis" / "rules.csv").open(newline="") as file:
        found = {(row["rule"], row["owner"]): int(row["count"]) for row in csv.DictReader(file)}
    assert 0 < is_dedicated_L.sum() < len(is_dedicated_L)
    for rule, mask_L in (("configured", ~is_dedicated_L), ("configured_dedicated", is_dedicated_L)):
        for owner in {*owner_L, *MODELS, "shared"}:
            assert found[rule, owner] == (owner_L[mask_L] == owner).sum()
