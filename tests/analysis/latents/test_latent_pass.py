"""The pass against plain dense computation, document by document: counts, top documents, samples."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.config import AnalysisSettings
from analysis.examples.database import Sample, read_samples
from analysis.latents.step import write_latents
from tests.analysis.random_study import (
    DEVICES,
    NUM_DOCUMENTS,
    NUM_LATENTS,
    dense_codes,
    document,
    length_of,
    make_study,
)

# The first quarter of the latents is the base's, the second the tuned model's: the weights rule out all others.
HELD = NUM_LATENTS // 2


class Analysed:
    """The study, its outputs, and the dense codes of its documents."""

    def __init__(self, root: Path, device: str):
        self.settings: AnalysisSettings = make_study(root)
        self.settings.analysis.device = device
        self.folder = root / "analysis"
        write_latents(self.settings, root / "crosscoder", self.folder)
        self.table: pa.Table = pq.read_table(self.folder / "latents.parquet")
        self.dense = dense_codes(self.settings)
        self.acts = np.concatenate([acts for _, acts, _ in self.dense])
        # Texts that occur twice count once: every seventh document says the same, plain text or chat.
        seen, self.distinct = set(), []
        for i in range(NUM_DOCUMENTS):
            content = document(i).content_sha256
            if content not in seen:
                self.distinct.append(i)
            seen.add(content)

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    def samples(self, latent: int) -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = defaultdict(list)
        with sqlite3.connect(self.folder / "examples.sqlite") as database:
            for sample in read_samples(database, latent):
                found[sample.kind].append(sample)
        return found

    def maxima(self, latent: int, place: int = 1) -> dict[int, float]:
        """The largest code (or, with place 2, pre-activation) in each document of a new text."""
        return {i: float(self.dense[i][place][:, latent].max()) for i in self.distinct if len(self.dense[i][0])}


@pytest.fixture(scope="module", params=DEVICES)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    return Analysed(tmp_path_factory.mktemp("study"), request.param)


def test_counts_equal_dense_ones(study: Analysed) -> None:
    fires = study.acts > 0
    assert fires[:, -1].sum() == 0 and fires[:, -2].mean() > 0.5  # planted
    assert study.column("num_active_tokens").tolist() == fires.sum(0).tolist()
    in_documents = sum((acts > 0).any(0).astype(int) for _, acts, _ in study.dense)
    assert study.column("num_documents").tolist() == in_documents.tolist()
    np.testing.assert_allclose(study.column("frequency"), fires.mean(0), rtol=1e-12)
    np.testing.assert_allclose(study.column("max_activation"), study.acts.max(0))
    with np.errstate(invalid="ignore"):
        expected = study.acts.sum(0, dtype=np.float64) / fires.sum(0)
    np.testing.assert_allclose(study.column("mean_activation"), expected, rtol=1e-6)


def test_histograms_equal_numpys(study: Analysed) -> None:
    edges = json.loads(study.table.schema.metadata[b"histogram_edges"])
    assert edges[0] == 2.0**-12 and edges[-1] == 2.0**12
    histograms = study.table["histogram"].to_pylist()
    for latent in range(NUM_LATENTS):
        values = study.acts[:, latent]
        assert histograms[latent] == np.histogram(values[values > 0], edges)[0].tolist()


def test_shares_equal_counts_by_role_and_source(study: Analysed) -> None:
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(NUM_LATENTS))
    for i, (positions, acts, _) in enumerate(study.dense):
        counts["source_prose" if i % 3 == 0 else "source_chat"] += (acts > 0).sum(0)
        for position, acts_L in zip(positions.tolist(), acts, strict=True):
            counts[kind_of(i, position)] += acts_L > 0
    with np.errstate(invalid="ignore"):
        shares = {name: count / study.column("num_active_tokens") for name, count in counts.items() if name != "text"}
    assert shares.keys() == {"template", "role_user", "role_assistant", "source_prose", "source_chat"}
    for name, share in shares.items():
        np.testing.assert_allclose(study.column(f"share_{name}"), share, rtol=1e-12)


def kind_of(number: int, position: int) -> str:
    """By the layout of `random_study.document`."""
    half, last = length_of(number) // 2, length_of(number) - 1
    if number % 3 == 0:
        return "text"
    if 1 <= position < half:
        return "role_user"
    return "role_assistant" if half < position < last else "template"


def test_top_documents_equal_a_full_sort(study: Analysed) -> None:
    with sqlite3.connect(study.folder / "examples.sqlite") as database:
        for latent in range(NUM_LATENTS):
            maxima = {i: value for i, value in study.maxima(latent).items() if value > 0}
            expected = sorted(maxima, key=lambda i: (-maxima[i], i))[:4]
            query = "SELECT document, activations FROM examples WHERE latent = ? ORDER BY rank"
            found = database.execute(query, (latent,)).fetchall()
            assert [document for document, _ in found] == expected
            for document, activations in found:
                positions, acts, _ = study.dense[document]
                fired = {int(p): v for p, v in zip(positions, acts[:, latent].tolist(), strict=True) if v > 0}
                assert dict(json.loads(activations)) == pytest.approx(fired, rel=1e-5)


def test_roles_and_sources_are_kept(study: Analysed) -> None:
    with sqlite3.connect(study.folder / "examples.sqlite") as database:
        rows = database.execute("SELECT document, source, roles FROM documents").fetchall()
    assert {source for _, source, _ in rows} == {"prose", "chat"}
    for number, source, roles in rows:
        assert source == document(number).source
        assert [tuple(role) for role in json.loads(roles)] == document(number).roles


def test_every_latent_that_fires_has_samples(study: Analysed) -> None:
    fired = study.column("num_active_tokens") > 0
    assert fired[HELD:].sum() > 8 and not fired[-1]
    for latent in range(NUM_LATENTS):
        assert bool(study.samples(latent)) == bool(fired[latent])


def test_samples_of_held_latents_alone(study: Analysed, tmp_path: Path) -> None:
    """They are the documents that these latents have among all."""
    study.settings.analysis.examples.sampled = "held"
    write_latents(study.settings, Path(study.settings.outputs) / "crosscoder", tmp_path)
    study.settings.analysis.examples.sampled = "all"
    found = []
    for folder, where in ((tmp_path, ""), (study.folder, f"WHERE latent < {HELD}")):
        with sqlite3.connect(folder / "examples.sqlite") as database:
            found.append(database.execute(f"SELECT * FROM samples {where} ORDER BY 1, 2, 3, 4").fetchall())
    assert found[0] == found[1] != []


def test_activating_samples_are_strata_of_documents_in_which_it_fires(study: Analysed) -> None:
    for latent in range(NUM_LATENTS):
        fires = {i: value for i, value in study.maxima(latent).items() if value > 0}
        samples = study.samples(latent)["activating"]
        assert len(samples) == min(6, len(fires)) == len({sample.document for sample in samples})
        for sample in samples:
            assert sample.max_activation == pytest.approx(fires[sample.document])
            assert max(sample.activations.values()) == pytest.approx(fires[sample.document], rel=1e-5)
        strengths = [sample.max_activation for sample in sorted(samples, key=lambda s: (s.quantile, s.max_activation))]
        assert strengths == sorted(strengths)
        sizes = np.bincount([sample.quantile for sample in samples], minlength=3)
        assert sizes.max() - sizes.min() <= 1 and len(sizes) == 3


def test_near_misses_are_the_best_that_stay_below_the_threshold(study: Analysed) -> None:
    for latent in np.flatnonzero(study.column("num_active_tokens")).tolist():
        fires, pre = study.maxima(latent), study.maxima(latent, place=2)
        silent = [i for i in fires if fires[i] == 0 and pre[i] > 0]
        expected = sorted(silent, key=lambda i: (-pre[i], i))[:3]
        found = study.samples(latent)["near_miss"]
        assert {sample.document for sample in found} == set(expected)
        for sample in found:
            assert sample.max_activation == pytest.approx(pre[sample.document], rel=1e-5)
            assert sample.quantile is None and not sample.activations
            positions, _, pre_BL = study.dense[sample.document]
            assert sample.position == positions[pre_BL[:, latent].argmax()]


def test_silent_samples_are_silent_and_no_near_misses(study: Analysed) -> None:
    for latent in np.flatnonzero(study.column("num_active_tokens")).tolist():
        samples, fires = study.samples(latent), study.maxima(latent)
        near = {sample.document for sample in samples["near_miss"]}
        candidates = {i for i, value in fires.items() if value == 0} - near
        found = [sample.document for sample in samples["silent"]]
        assert len(found) == len(set(found)) == min(5, len(candidates)) and set(found) <= candidates


def test_batches_change_no_document(study: Analysed, tmp_path: Path) -> None:
    """What is drawn is a function of the store and the seed; sums differ by rounding, also those of intervals."""
    study.settings.analysis.batch_tokens = 100
    write_latents(study.settings, Path(study.settings.outputs) / "crosscoder", tmp_path)
    study.settings.analysis.batch_tokens = 12
    query = "SELECT latent, {}, document FROM {} ORDER BY 1, 2, 3"
    for table, key in (("examples", "rank"), ("samples", "kind || ifnull(quantile, '')")):
        found = []
        for folder in (tmp_path, study.folder):
            with sqlite3.connect(folder / "examples.sqlite") as database:
                found.append(database.execute(query.format(key, table)).fetchall())
        assert found[0] == found[1]
    other = pq.read_table(tmp_path / "latents.parquet")
    for name in ("nu_error_base_low", "nu_error_base_high", "nu_reconstruction_tuned_low", "num_documents"):
        np.testing.assert_allclose(other[name].to_numpy(), study.column(name), rtol=1e-4, atol=1e-5)
