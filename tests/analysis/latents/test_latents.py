"""The pass over a store of planted activations: statistics, owners, kept tokens, repeated texts and examples."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analysis.config import AnalysisSettings
from analysis.firings.token_kinds import TokenKinds
from analysis.latents.activity import Activity
from analysis.latents.scaling import decoder_gram
from analysis.latents.step import OUTPUTS, check_fit, write_latents
from analysis.latents.table import Scaling, latent_table, owners_of
from extract.errors import BadInput
from extract.shards import write_activations, write_tokens
from extract.stores import TokenDocument
from extract.tokenizer import tokenizer_sha256
from tests import tiny
from tests.analysis.random_study import settings_of_store
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.data import ActivationPairs

D, LENGTH, NUM_DOCUMENTS = 8, 6, 12
TEXTS = [f"{i:02d} text" for i in range(NUM_DOCUMENTS - 1)] + ["03 text"]  # the last repeats an earlier one
MODELS = ["base", "tuned"]
# What is stored is planted / SCALE + MEAN, so only who scales finds the planted values.
SCALE, MEAN = torch.tensor([2.0, 0.5]), torch.tensor([[0.25], [-0.5]])


def planted_activations() -> torch.Tensor:
    """(documents, tokens, models, D): axis 0 is used by the base, 1 by the tuned model, 2 by both, 3 never.

    Position 0 is an attention sink: large values on axes 0 to 2 that must not count.
    """
    generator = torch.Generator().manual_seed(1)
    use = torch.rand(NUM_DOCUMENTS, LENGTH, 3, generator=generator) * 4 - 2
    use = use.relu()
    acts = torch.zeros(NUM_DOCUMENTS, LENGTH, 2, D)
    acts[:, :, 0, 0], acts[:, :, 1, 1] = use[..., 0], use[..., 1]
    acts[:, :, 0, 2] = acts[:, :, 1, 2] = use[..., 2]
    acts[:, :, :, 7] = 1.0  # so that no norm is zero
    acts[:, 0, :, :3] = 3.0
    acts[3, 4, 1, 1] = 2.5  # strong enough to be among the examples
    acts[-1] = acts[3]
    return acts


def crosscoder_for(
    axes: dict[int, tuple[float, ...]], models: list[str] = MODELS, threshold: float | None = 0.5
) -> Crosscoder:
    """Latent j reads and writes axis j with the given weight in each model; what reads twice reads half."""
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=len(axes), k=2), models, D, "block1")
    with torch.no_grad():
        for j, weights in axes.items():
            for m, weight in enumerate(weights):
                crosscoder.W_dec[j, m * D + j] = weight
                crosscoder.W_enc[j, m * D + j] = weight / sum(w != 0 for w in weights)
        crosscoder.b_dec.view(len(models), D)[:, 7] = 1.0
        crosscoder.b_dec[2] = 0.5  # of the base: a mistake that nu must see
    if len(models) == 2:
        crosscoder.activation_scale.copy_(SCALE)
        crosscoder.activation_mean.copy_(MEAN.expand(2, D))
    crosscoder.threshold = threshold
    return crosscoder


PLANTED = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (1.0, 1.0), 3: (1.0, 1.0)}


def stored(root: Path, acts: torch.Tensor, texts: list[str] = TEXTS) -> AnalysisSettings:
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    ids = [np.array(tokenizer(text)["input_ids"][:LENGTH], dtype=np.uint32) for text in texts]
    written = [TokenDocument("", f"d{i}", "tests", ids[i], text) for i, text in enumerate(texts)]
    write_tokens(root / "store", written, {"tokenizer_sha256": tokenizer_sha256(tokenizer)})

    def documents(model: int) -> Iterator[tuple[str, torch.Tensor]]:
        raw = acts[:, :, model] / SCALE[model] + MEAN[model]
        return ((f"{i:09d}", raw[i].contiguous()) for i in range(NUM_DOCUMENTS))

    for m, model in enumerate(MODELS):
        write_activations(root / "store", model, "block1", documents(m))
    settings = settings_of_store(root, MODELS)
    settings.analysis.examples.top_documents = settings.analysis.annotate.num_documents = 4
    settings.analysis.device = "cpu"
    return settings


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[AnalysisSettings, Path]:
    root = tmp_path_factory.mktemp("latents")
    settings = stored(root, planted_activations())
    crosscoder_for(PLANTED).save(root / "crosscoder")
    write_latents(settings, root / "crosscoder", root / "analysis")
    return settings, root / "analysis"


def rows(folder: Path) -> dict[str, list]:
    return pq.read_table(folder / "latents.parquet").to_pydict()


def test_columns(analysed: tuple[AnalysisSettings, Path]) -> None:
    names = {"latent", "owner", "dedicated", "delta_norm", "delta_norm_tag", "decoder_cosine"}
    names |= {"frequency", "num_active_tokens", "num_documents", "mean_activation", "max_activation", "histogram"}
    names |= {"group", "share_template", "share_source_tests"} | {f"norm_{model}" for model in MODELS}
    nus = {f"{name}_{model}" for name in ("nu_error", "nu_reconstruction") for model in MODELS}
    names |= nus | {f"{name}_{end}" for name in nus for end in ("low", "high")}
    assert set(rows(analysed[1])) == names


def test_statistics_count_kept_tokens_of_all_documents(analysed: tuple[AnalysisSettings, Path]) -> None:
    acts, table = planted_activations()[:, 1:], rows(analysed[1])
    for j, model in ((0, 0), (1, 1), (2, 0)):
        use = acts[:, :, model, j].flatten()
        # s is the sum of the decoder norms: 1 for an exclusive latent, 2 for the shared one.
        fired = use[use * (2 if j == 2 else 1) > 0.5]
        assert table["num_active_tokens"][j] == len(fired)
        assert table["frequency"][j] == pytest.approx(len(fired) / (NUM_DOCUMENTS * (LENGTH - 1)))
        assert table["mean_activation"][j] == pytest.approx(fired.mean().item(), rel=1e-5)
        assert table["max_activation"][j] == pytest.approx(fired.max().item(), rel=1e-5)
    assert table["num_active_tokens"][3] == 0 and np.isnan(table["mean_activation"][3])


def test_owners_and_scaling(analysed: tuple[AnalysisSettings, Path]) -> None:
    table = rows(analysed[1])
    assert table["owner"] == ["base", "tuned", "shared", "dead"]
    assert table["delta_norm"] == pytest.approx([0, 1, 0.5, 0.5])
    assert table["delta_norm_tag"] == ["base-only", "tuned-only", "shared", "dead"]
    assert table["dedicated"] == [False] * 4
    assert table["decoder_cosine"][2:] == pytest.approx([1, 1]) and np.isnan(table["decoder_cosine"][0])
    assert table["norm_base"] == [1, 0, 1, 1] and table["norm_tuned"] == [0, 1, 1, 1]
    assert table["nu_error_base"][0] == pytest.approx(0, abs=1e-6)
    assert table["nu_error_tuned"][1] == pytest.approx(0, abs=1e-6)
    # On axis 2 the base is reconstructed as f + 0.5 and is f: its beta is 1 -+ sum 0.5 f / sum f^2, the tuned one 1.
    f = planted_activations()[:, 1:, 1, 2].flatten()
    f = f[f * 2 > 0.5]
    excess = (0.5 * f.sum() / f.square().sum()).item()
    assert table["nu_error_tuned"][2] == pytest.approx(1 - excess, rel=1e-4)
    assert table["nu_error_base"][2] == pytest.approx(1 / (1 - excess), rel=1e-4)
    assert table["nu_reconstruction_tuned"][2] == pytest.approx(1 + excess, rel=1e-4)
    assert np.isnan(table["nu_error_tuned"][0]) and np.isnan(table["nu_error_base"][3])


def test_examples_are_the_strongest_writtenonce_per_text(analysed: tuple[AnalysisSettings, Path]) -> None:
    acts = planted_activations()
    acts[:, 0] = 0
    with sqlite3.connect(analysed[1] / "examples.sqlite") as database:
        examples = database.execute("SELECT * FROM examples WHERE latent = 1 ORDER BY rank").fetchall()
        tokens = dict(database.execute("SELECT document, text_tokens FROM documents").fetchall())
    use = acts[:-1, :, 1, 1]  # document 11 repeats document 3
    strongest = use.amax(dim=1).argsort(descending=True)[:4].tolist()
    assert strongest[0] == 3
    assert [row[1:3] for row in examples] == list(enumerate(strongest))
    for _, _, document, maximum, activations in examples:
        assert maximum == pytest.approx(use[document].max().item())
        fired = {i: value for i, value in enumerate(use[document].tolist()) if value > 0.5}
        assert dict(json.loads(activations)) == pytest.approx(fired, rel=1e-5)
        assert "".join(json.loads(tokens[document])) == "<bos>" + TEXTS[document][: LENGTH - 1]


def test_document_maxima_hold_the_latents_that_may_be_owned(analysed: tuple[AnalysisSettings, Path]) -> None:
    table = pq.read_table(analysed[1] / "document_maxima.parquet").to_pylist()
    acts = planted_activations()[:, 1:]
    assert {row["latent"] for row in table} == {0, 1}
    expected = {
        (j, i): maximum
        for j in (0, 1)
        for i, maximum in enumerate(acts[:, :, j, j].amax(dim=1).tolist())
        if maximum > 0.5
    }
    assert {(row["latent"], row["document"]): row["max_activation"] for row in table} == pytest.approx(expected)


@pytest.mark.parametrize("batch_tokens", [1, 11])
def test_batches_change_nothing(analysed: tuple[AnalysisSettings, Path], tmp_path: Path, batch_tokens: int) -> None:
    settings, folder = analysed
    before, settings.analysis.batch_tokens = settings.analysis.batch_tokens, batch_tokens
    write_latents(settings, Path(settings.outputs) / "crosscoder", tmp_path)
    settings.analysis.batch_tokens = before
    found, expected = rows(tmp_path), rows(folder)
    assert found["owner"] == expected["owner"]
    for name in ("num_active_tokens", "mean_activation", "nu_error_base", "nu_reconstruction_tuned"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)
    with sqlite3.connect(tmp_path / "examples.sqlite") as a, sqlite3.connect(folder / "examples.sqlite") as b:
        query = "SELECT latent, rank, document FROM examples ORDER BY latent, rank"
        assert a.execute(query).fetchall() == b.execute(query).fetchall()


def test_a_document_without_a_kept_token_changes_nothing(
    analysed: tuple[AnalysisSettings, Path], tmp_path: Path
) -> None:
    """The last document, a repeated text, has norms that are all out of bounds, and a batch to itself."""
    acts = planted_activations()
    acts[-1] = 1e4
    settings = stored(tmp_path, acts)
    settings.analysis.batch_tokens = 1
    write_latents(settings, Path(analysed[0].outputs) / "crosscoder", tmp_path / "analysis")
    kept = acts[:-1, 1:, 0, 0].flatten()
    assert rows(tmp_path / "analysis")["num_active_tokens"][0] == int((kept > 0.5).sum())
    assert rows(tmp_path / "analysis")["frequency"][0] == pytest.approx(float((kept > 0.5).sum()) / len(kept))


def test_three_models_have_columns_for_every_ordered_pair(tmp_path: Path) -> None:
    crosscoder = crosscoder_for({0: (0.0, 0.0, 1.0), 1: (1.0, 1.0, 1.0)}, models=["a", "b", "c"])
    gram = decoder_gram(crosscoder.W_dec.view(2, 3, D))
    activity = Activity(2, TokenKinds([], np.zeros(0, np.uint8), [], np.zeros(0, np.int64)))
    scaling = Scaling(gram, (np.zeros((2, 3, 3)), np.zeros((2, 3, 3))), np.zeros((2, 2, 2, 3, 3)))
    owner = AnalysisSettings().analysis.owner
    owner_L = owners_of(activity, scaling, crosscoder, owner)
    table = latent_table(activity, scaling, crosscoder, owner_L, np.arange(2), owner).to_pydict()
    names = ("delta_norm", "delta_norm_tag", "decoder_cosine", "nu_error", "nu_reconstruction")
    pairs = ("a_b", "a_c", "b_a", "b_c", "c_a", "c_b")
    expected = {f"{name}_{pair}" for name in names for pair in pairs}
    expected |= {f"{name}_{pair}_{end}" for name in names[3:] for pair in pairs for end in ("low", "high")}
    assert expected == {column for column in table if column.startswith(names)}
    assert table["delta_norm_a_c"] == [1, 0.5] and table["delta_norm_c_a"] == [0, 0.5]
    assert table["owner"] == ["dead", "dead"]


def test_a_crosscoder_of_other_models(analysed: tuple[AnalysisSettings, Path], tmp_path: Path) -> None:
    crosscoder_for(PLANTED, models=["base", "else"]).save(tmp_path / "crosscoder")
    with pytest.raises(BadInput, match=r"trained on \['base', 'else'\].*holds \['base', 'tuned'\]"):
        write_latents(analysed[0], tmp_path / "crosscoder", tmp_path / "analysis")
    assert not (tmp_path / "analysis").exists()


def test_a_crosscoder_of_another_hookpoint(analysed: tuple[AnalysisSettings, Path], tmp_path: Path) -> None:
    crosscoder = crosscoder_for(PLANTED)
    crosscoder.hookpoint = "block2"
    crosscoder.save(tmp_path / "crosscoder")
    with pytest.raises(BadInput, match=r"trained at block2, .*hookpoint=block1"):
        write_latents(analysed[0], tmp_path / "crosscoder", tmp_path / "analysis")
    assert not (tmp_path / "analysis").exists()


def test_a_crosscoder_without_threshold(analysed: tuple[AnalysisSettings, Path], tmp_path: Path) -> None:
    crosscoder_for(PLANTED, threshold=None).save(tmp_path / "crosscoder")
    with pytest.raises(BadInput, match="threshold_start_step"):
        write_latents(analysed[0], tmp_path / "crosscoder", tmp_path / "analysis")


def test_activations_that_have_changed_since_training_are_said(
    analysed: tuple[AnalysisSettings, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same tokens; a store of other tokens has other activations anyhow."""
    pairs, crosscoder = ActivationPairs.open(analysed[0]), crosscoder_for(PLANTED)
    tokens, base, tuned = pairs.content_sha256
    for data in ([tokens, base, tuned], ["0" * 64, base, "1" * 64], []):
        crosscoder.trained_with = {"data": data}
        check_fit(crosscoder, pairs, "block1", tmp_path)
        assert not caplog.text
    crosscoder.trained_with = {"data": [tokens, base, "1" * 64]}
    check_fit(crosscoder, pairs, "block1", tmp_path)
    assert f"{tmp_path} was trained on other activations of the same tokens: those of tuned have" in caplog.text


FILES = {"commit": None, "files": {"model.safetensors": "1" * 64}, "adapter": {}}
COMMIT = {"commit": "1" * 40, "files": {}, "adapter": {}}


@pytest.mark.parametrize(
    ("trained_on", "stored", "is_refused"),
    [
        (FILES, FILES | {"files": {"model.safetensors": "2" * 64}}, True),
        (COMMIT, COMMIT | {"commit": "2" * 40}, True),
        (FILES, FILES | {"adapter": {"adapter_model.safetensors": "3" * 64}}, True),
        (FILES, FILES, False),
        (FILES, COMMIT, False),  # a folder may hold what the hub has
        (COMMIT, {}, False),
        (None, FILES, False),  # a crosscoder from before weights were recorded
    ],
)
def test_a_store_of_other_weights_is_refused(
    analysed: tuple[AnalysisSettings, Path], tmp_path: Path, trained_on: dict | None, stored: dict, is_refused: bool
) -> None:
    pairs, crosscoder = ActivationPairs.open(analysed[0]), crosscoder_for(PLANTED)
    for store, weights in zip(pairs.stores, (FILES, stored), strict=True):
        store.manifest.settings["model"] = {"weights": weights}
    crosscoder.trained_with = {} if trained_on is None else {"weights": {"base": FILES, "tuned": trained_on}}
    refused = pytest.raises(BadInput, match=r"other weights of tuned than the store.*Train .* again, or .*store=PATH")
    with refused if is_refused else nullcontext():
        check_fit(crosscoder, pairs, "block1", tmp_path)


def test_a_failing_pass_leaves_no_output(
    analysed: tuple[AnalysisSettings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Crosscoder, x_BMD: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Crosscoder, "scale", broken)
    with pytest.raises(RuntimeError):
        write_latents(analysed[0], Path(analysed[0].outputs) / "crosscoder", tmp_path / "analysis")
    assert [path.name for path in (tmp_path / "analysis").iterdir()] == ["pass"]


def test_a_finished_analysis_leaves_its_outputs_alone(analysed: tuple[AnalysisSettings, Path]) -> None:
    assert sorted(path.name for path in analysed[1].iterdir()) == sorted([*OUTPUTS, "pass"])
