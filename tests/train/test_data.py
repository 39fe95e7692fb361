"""Stores opened together: kept tokens, statistics, held-out documents, and the order of batches."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from planted import HOOKPOINT, random_store, settings_of, write_documents, write_model

from extract.errors import BadInput
from extract.shards import write_activations
from extract.stores import ActivationStore
from train.data import ActivationPairs, heldout_batches
from train.stream import BatchStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    random_store(folder / "store")
    return folder


@pytest.fixture
def pairs(folder):
    return ActivationPairs.open(settings_of(folder))


def all_documents(pairs):
    return [torch.stack([store.document(i).double() for store in pairs.stores], 1) for i in range(pairs.num_documents)]


def all_train_rows(pairs):
    return [int(row) for shard in range(pairs.tokens.num_shards) for row in pairs.train_rows(shard)]


def outlier_store(store, skip=1):
    """Outliers: document 2, position 4 of the base; document 5, position 3 of the tuned model; its first tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [12] * 9
    base, tuned = (torch.randn(9, 12, 5, generator=generator) for _ in range(2))
    base[2, 4] *= 1000
    tuned[5, 3] *= 1000
    tuned[:, 0] *= 500
    write_documents(store, lengths)
    write_model(store, "base", lengths, lambda i, n: base[i], skip)
    write_model(store, "tuned", lengths, lambda i, n: tuned[i], skip)


@pytest.mark.parametrize("kind", ["norm", "mean_variance", "none"])
@pytest.mark.parametrize(("skip", "extracted_skip"), [(1, 1), (3, 1), (1, 3), (0, 2)])
def test_kept_tokens_and_their_statistics_equal_a_brute_force_pass(tmp_path, kind, skip, extracted_skip):
    outlier_store(tmp_path / "store", extracted_skip)
    settings = settings_of(tmp_path)
    settings.kept.skip_first_tokens = skip
    settings.crosscoder.activation_scaling = kind
    pairs = ActivationPairs.open(settings)
    documents = all_documents(pairs)
    limit = [
        10 * np.mean([x[t, m].norm().item() for x in documents for t in range(len(x)) if t >= skip]) for m in range(2)
    ]
    kept, dropped = [], 0
    for i, x in enumerate(documents):
        expected = [t >= skip and all(x[t, m].norm() <= limit[m] for m in range(2)) for t in range(len(x))]
        raw, mask = pairs.document(i)
        assert mask.tolist() == expected
        assert torch.equal(raw, x.float())
        kept += [x[t] for t in range(len(x)) if expected[t]]
        dropped += expected.count(False)
    if skip > 0:
        assert dropped == 9 * skip + (2 if skip <= 3 else 1)
    assert pairs.share_dropped == pytest.approx(dropped / (9 * 12))
    kept = torch.stack(kept)
    mean, scale = torch.zeros(2, 5).double(), torch.ones(2).double()
    if kind == "norm":
        scale = 5**0.5 / kept.norm(dim=2).mean(0)
    if kind == "mean_variance":
        mean = kept.mean(0)
        scale = 1 / (kept - mean).square().mean((0, 2)).sqrt()
    torch.testing.assert_close(pairs.activation_mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pairs.activation_scale, scale.float(), rtol=1e-5, atol=1e-6)
    scaled = (kept.float() - pairs.activation_mean) * pairs.activation_scale[:, None]
    if kind == "norm":
        torch.testing.assert_close(scaled.norm(dim=2).mean(0), torch.full((2,), 5**0.5))
    if kind == "mean_variance":
        torch.testing.assert_close(scaled.mean(0), torch.zeros(2, 5), rtol=0, atol=1e-5)
        torch.testing.assert_close(scaled.square().mean((0, 2)), torch.ones(2))


def test_training_rows_are_the_kept_tokens_of_training_documents(pairs):
    expected, row = [], 0
    for i in range(pairs.num_documents):
        _, kept = pairs.document(i)
        for t in range(len(kept)):
            if kept[t] and not pairs.is_heldout[i]:
                expected.append(row)
            row += 1
    assert all_train_rows(pairs) == expected
    assert pairs.num_train_tokens == pairs.train_tokens.sum() == len(expected)
    documents = np.searchsorted(pairs.tokens.row_starts, expected, side="right") - 1
    assert np.bincount(documents, minlength=pairs.num_documents).tolist() == pairs.train_tokens.tolist()


def test_stores_of_different_precision_are_read_as_float32(tmp_path):
    lengths = [10] * 12
    write_documents(tmp_path / "store", lengths)
    write_model(tmp_path / "store", "base", lengths, lambda i, n: torch.full((n, 3), 1.5 + i).bfloat16())
    write_model(tmp_path / "store", "tuned", lengths, lambda i, n: torch.full((n, 3), 0.1 + i))
    pairs = ActivationPairs.open(settings_of(tmp_path))
    batch = pairs.gather(np.array([25, 3]))
    torch.testing.assert_close(batch[:, :, 0], torch.tensor([[3.5, 2.1], [1.5, 0.1]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_rows_of_coded_stores_are_those_of_their_documents(tmp_path, codec):
    lengths = random_store(tmp_path / "store")
    store = tmp_path / "store"
    for model in ("base", "tuned"):
        source = ActivationStore(store / "activations" / model / HOOKPOINT)
        documents = ((key, source.document(i)) for i, key in enumerate(source.keys))
        write_activations(store, model, "block4", documents, codec=codec)
    settings = settings_of(tmp_path)
    settings.hookpoint = "block4"
    coded, plain = ActivationPairs.open(settings), ActivationPairs.open(settings_of(tmp_path))
    everything = torch.cat(all_documents(coded))
    rows = np.random.default_rng(0).permutation(sum(lengths))
    batch = coded.gather(rows)
    assert batch.dtype == torch.float32 and torch.equal(batch.double(), everything[rows])
    error = (everything - torch.cat(all_documents(plain))).norm() / everything.norm()
    assert 0 < error < {"fp8": 0.04, "int8": 0.01}[codec]  # far from another model's or token's values


def test_a_remote_store_trains_like_a_local_one(folder, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSDIFF_CACHE", str(tmp_path / "cache"))
    settings = settings_of(folder)
    settings.store = f"pipe:cat {folder}/store"
    remote = ActivationPairs.open(settings)
    assert remote.content_sha256 == pairs.content_sha256
    batches = [BatchStream(each, 0, 50, settings.data).batch(3) for each in (remote, pairs)]
    assert torch.equal(*batches)
    settings.hookpoint = "block9"
    with pytest.raises(BadInput, match="base/block9/manifest.json could not be fetched"):
        ActivationPairs.open(settings)


def test_held_out_documents_are_a_matter_of_content_alone(tmp_path):
    texts = [f"text {i}" for i in range(60)]
    texts[17] = texts[3]  # the same text twice, far apart
    heldout = []
    for name, order in (("forward", list(range(60))), ("backward", list(range(59, -1, -1)))):
        store = tmp_path / name / "store"
        write_documents(store, [5] * 60, [texts[i] for i in order])
        for model in ("base", "tuned"):
            write_model(store, model, [5] * 60, lambda i, n: torch.randn(n, 3))
        settings = settings_of(tmp_path / name)
        pairs = ActivationPairs.open(settings)
        heldout.append({order[i] for i in np.flatnonzero(pairs.is_heldout)})
        assert len({bool(pairs.is_heldout[order.index(i)]) for i in (3, 17)}) == 1
        number = {i: int(pairs.tokens.document(order.index(i)).content_sha256, 16) for i in range(60)}
        assert heldout[-1] == {i for i in range(60) if number[i] < 0.2 * 2**256}
    assert heldout[0] == heldout[1]
    assert 4 <= len(heldout[0]) <= 22  # Binomial(60, 0.2): mean 12, standard deviation 3.1


def test_held_out_batches_cover_held_out_tokens_once(pairs):
    everything = torch.cat(all_documents(pairs)).bfloat16()
    batches = list(heldout_batches(pairs, 16, None))
    rows = pairs.heldout_rows(None)
    kept_heldout = set(np.flatnonzero(pairs.kept.mask)) - set(all_train_rows(pairs))
    assert Counter(rows.tolist()) == Counter(int(row) for row in kept_heldout)
    assert torch.equal(torch.cat([x_BMD for x_BMD, _ in batches]), everything[rows])
    assert sum(len(x_BMD) for x_BMD, _ in heldout_batches(pairs, 16, 40)) == 40


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_of_held_out_batches_make_them_whole(pairs, num_parts):
    """Also a last batch of fewer tokens than there are parts."""
    whole = list(heldout_batches(pairs, 16, 35))
    assert [len(x_BMD) for x_BMD, _ in whole] == [16, 16, 3]
    parts = [list(heldout_batches(pairs, 16, 35, part, num_parts)) for part in range(num_parts)]
    for batch, (x_BMD, token_B) in enumerate(whole):
        assert token_B.tolist() == list(range(len(x_BMD)))
        x_parts, token_parts = zip(*(part[batch] for part in parts), strict=True)
        order_B = torch.cat(token_parts).argsort()
        assert torch.equal(torch.cat(x_parts)[order_B], x_BMD)
        assert x_parts[-1].shape[1:] == (2, 6)


def test_a_limit_takes_held_out_documents_in_the_order_of_their_hashes(pairs):
    """Not the first of the store, which may all come from one source."""
    by_hash = sorted((pairs.tokens.document(i).content_sha256, i) for i in np.flatnonzero(pairs.is_heldout))
    starts = np.cumsum(pairs.tokens.lengths) - pairs.tokens.lengths
    expected = [starts[i] + t for _, i in by_hash for t in np.flatnonzero(pairs.document(i)[1].numpy())]
    assert [i for _, i in by_hash] != sorted(i for _, i in by_hash)
    assert pairs.heldout_rows(25).tolist() == expected[:25]


def test_no_held_out_documents_on_request(folder):
    settings = settings_of(folder)
    settings.data.heldout_fraction = 0.0
    pairs = ActivationPairs.open(settings)
    assert not pairs.is_heldout.any()
    assert list(heldout_batches(pairs, 16, None)) == []


def test_too_little_to_hold_out_is_an_error(tmp_path):
    write_documents(tmp_path / "store", [50], ["one text"])
    for model in ("base", "tuned"):
        write_model(tmp_path / "store", model, [50], lambda i, n: torch.randn(n, 3))
    settings = settings_of(tmp_path)
    settings.data.heldout_fraction = 1e-9
    with pytest.raises(BadInput, match="holds out none of the 1 documents"):
        ActivationPairs.open(settings)


def test_a_store_smaller_than_a_batch_is_an_error(folder):
    settings = settings_of(folder)
    settings.training.num_tokens_per_step = 100_000
    with pytest.raises(BadInput, match="num_tokens_per_step=100000"):
        ActivationPairs.open(settings)


def test_missing_activations_list_what_there_is(folder):
    settings = settings_of(folder)
    settings.hookpoint = "block9"
    with pytest.raises(BadInput, match=f"hookpoint=block9.*There are: base/{HOOKPOINT}, tuned/{HOOKPOINT}"):
        ActivationPairs.open(settings)


def test_activations_of_other_tokens_are_refused(tmp_path):
    random_store(tmp_path / "store")
    random_store(tmp_path / "other" / "store", num_documents=41)
    theirs = tmp_path / "store" / "activations" / "tuned"
    shutil.rmtree(theirs)
    shutil.copytree(tmp_path / "other" / "store" / "activations" / "tuned", theirs)
    with pytest.raises(BadInput, match="tuned.*was extracted from other tokens"):
        ActivationPairs.open(settings_of(tmp_path))


def test_models_of_different_width_are_refused_with_both_widths(tmp_path):
    write_documents(tmp_path / "store", [20] * 4)
    write_model(tmp_path / "store", "base", [20] * 4, lambda i, n: torch.randn(n, 3))
    write_model(tmp_path / "store", "tuned", [20] * 4, lambda i, n: torch.randn(n, 4))
    with pytest.raises(BadInput, match="base/block3 has width 3, .*tuned/block3 has 4"):
        ActivationPairs.open(settings_of(tmp_path))


def test_constant_zero_activations_are_refused(tmp_path):
    write_documents(tmp_path / "store", [20] * 10)
    write_model(tmp_path / "store", "base", [20] * 10, lambda i, n: torch.randn(n, 3))
    write_model(tmp_path / "store", "tuned", [20] * 10, lambda i, n: torch.zeros(n, 3))
    with pytest.raises(BadInput, match="model tuned are all zero"):
        ActivationPairs.open(settings_of(tmp_path))
