"""Training whose activations are computed on the way, against training on stored ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import OUTLIERS, SMALL, bits, settings_of, stream_of

from extract.activations import extract
from extract.config import ModelConfig
from extract.errors import BadInput
from extract.tokens import make_tokens
from tests import tiny
from train.config import TrainSettings
from train.data import ActivationPairs, gather, heldout_batches
from train.trainer import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "own",
    [
        [],
        ["activations.codec=fp8", "crosscoder.activation_scaling=mean_variance"],
        ["activations.codec=int8", "kept.skip_first_tokens=3"],
        ["models.tuned.dtype=float32"],
        ["kept.max_norm_ratio=1.25"],
    ],
)
def test_the_stream_is_the_stored_one_bit_for_bit(study, online, own):
    """Over two and a half epochs, with codecs, models of two precisions, and outliers that the calibration meets."""
    settings = settings_of(study, *own)
    make_tokens(settings)
    extract(settings)
    stored, computed = ActivationPairs.open(settings), online(settings)
    assert len(stored.tokens.shard_documents()) > settings.data.num_lanes
    assert torch.equal(computed.activation_scale, stored.activation_scale)
    assert torch.equal(computed.activation_mean, stored.activation_mean)
    assert computed.share_dropped == pytest.approx(stored.share_dropped, abs=1e-12)
    assert (stored.share_dropped > 0.06) == ("kept.max_norm_ratio=1.25" in own or "kept.skip_first_tokens=3" in own)
    assert np.array_equal(computed.train_tokens, stored.train_tokens)
    assert computed.weights == stored.weights and all(weights["files"] for weights in stored.weights.values())
    streams = [stream_of(data, settings) for data in (stored, computed)]
    for step in range(5 * int(stored.train_tokens.sum()) // (2 * 64)):
        expected, found = (stream.batch(step) for stream in streams)
        assert expected.dtype == found.dtype and torch.equal(bits(expected), bits(found))
    assert computed.num_replaced == 0


def test_three_models_at_once(study, online, tmp_path):
    settings = settings_of(study)
    settings.models["third"] = ModelConfig(str(tiny.save_model(tmp_path / "third", seed=7)))
    settings.pairs = {"base_tuned": ["base", "tuned", "third"]}
    make_tokens(settings)
    extract(settings)
    streams = [stream_of(data, settings) for data in (ActivationPairs.open(settings), online(settings))]
    for step in range(10):
        expected, found = (stream.batch(step) for stream in streams)
        assert found.shape == (64, 3, 16) and torch.equal(bits(expected), bits(found))


def test_held_out_tokens_are_the_stored_ones_up_to_rounding(study, online):
    """In float32; the choice of documents, their order and the limit are the same."""
    precise = [f"models.{name}.dtype=float32" for name in ("base", "tuned")]
    settings = settings_of(study, *precise, "data.max_validation_tokens=150")
    make_tokens(settings)
    extract(settings)
    stored, computed = ActivationPairs.open(settings), online(settings)
    assert len(stored.heldout_rows(None)) > 200
    assert np.array_equal(computed.heldout_rows(150), stored.heldout_rows(150))
    batches = heldout_batches(stored, 64, 150), heldout_batches(computed, 64, 150)
    for (expected, _), (found, _) in zip(*batches, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def replacements(stored: ActivationPairs, settings: TrainSettings, calibrated: int) -> tuple[np.ndarray, np.ndarray]:
    """For every row of the store, the row that a stream shows in its place, and whether the order of tokens knows it,
    from stored activations: the limit is that of the shard `calibrated`.
    """
    tokens, ratio = stored.tokens, settings.kept.max_norm_ratio
    norms = [[store.norms(i).double().numpy() for i in range(tokens.num_documents)] for store in stored.stores]
    documents = tokens.shard_documents()
    limits = [ratio * np.concatenate([model[i][1:] for i in documents[calibrated]]).mean() for model in norms]
    shown = np.arange(tokens.num_tokens)
    known = np.zeros(tokens.num_tokens, dtype=bool)
    for number, shard in enumerate(documents):
        rows, bad = [], []
        for i in shard:
            for position in range(1, tokens.lengths[i]):
                outlier = any(model[i][position] > limit for model, limit in zip(norms, limits, strict=True))
                if not stored.is_heldout[i] and not (outlier and number == calibrated):
                    rows.append(int(tokens.row_starts[i]) + position)
                    bad.append(outlier)
        known[rows] = True
        for at in range(len(rows)):
            here = at
            while bad[here]:
                here = (here + 1) % len(rows)
            shown[rows[at]] = rows[here]
    return shown, known


def test_an_outlier_is_replaced_by_the_next_kept_token_of_its_shard_and_counted(study, online, caplog):
    settings = settings_of(study, *OUTLIERS)
    make_tokens(settings)
    extract(settings)
    stored = ActivationPairs.open(settings)
    num_shards = stored.tokens.num_shards
    shown, known = replacements(stored, settings, calibrated=num_shards // 2)
    with caplog.at_level("INFO", logger="train"):
        computed = online(settings)
        assert np.array_equal(
            np.concatenate([computed.train_rows(i) for i in range(num_shards)]), np.flatnonzero(known)
        )
        assert computed.train_tokens.sum() == known.sum()
        for number in range(num_shards):
            rows = computed.train_rows(number)
            assert torch.equal(bits(gather(computed, rows)), bits(stored.gather(shown[rows])))
    replaced = int((shown[known] != np.flatnonzero(known)).sum())
    assert computed.num_replaced == replaced > 20
    assert f"calibrating on 1 of {num_shards} shards" in caplog.text and "stood in for outliers" in caplog.text
    assert not set(computed.heldout_rows(None)) & set(np.flatnonzero(known))


def test_a_stream_of_nothing_but_outliers_is_refused(study, online):
    """With calibrated norms made a thousand times too small."""
    settings = settings_of(study, *OUTLIERS)
    make_tokens(settings)
    data = online(settings)
    data._calibration.limit_M /= 1000
    shard = next(i for i in range(5) if i != data.tokens.num_shards // 2)
    with pytest.raises(BadInput, match=rf"All \d+ training tokens of shard {shard} exceed kept.max_norm_ratio=1.25"):
        gather(data, data.train_rows(shard))


def lines_of(run: Path) -> list[dict]:
    """What was logged, without speeds and what held-out tokens give."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/", "val/"))} for line in lines]


def test_a_run_resumed_in_the_middle_equals_an_uninterrupted_one(study, tmp_path):
    """More than two epochs; the calibration is gone by the second start."""
    settings = settings_of(study, "data=online", *OUTLIERS)
    make_tokens(settings)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(settings, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "crosscoder")
    shutil.rmtree(resumed / "checkpoints" / "step-00000050")
    shutil.rmtree(Path(settings.outputs) / "online")
    train(settings, resumed)
    for file in ("crosscoder/crosscoder.safetensors", "crosscoder/config.json"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    assert lines_of(resumed) == lines_of(whole)
    assert [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()] == [*range(1, 51)]


@pytest.mark.slow
def test_the_public_commands_give_the_same_crosscoder_either_way(study):
    """python -m extract.tokens, then train data=online; extract.activations, then train: the same bits, over more than
    two epochs; only tokens are in the store before.
    """

    def command(module: str, *overrides: str) -> None:
        arguments = [sys.executable, "-m", module, *study, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    settings = settings_of(study)
    command("extract.tokens", "data=online")
    command("train", *SMALL, "data=online")
    assert not (Path(settings.store) / "activations").exists()
    command("extract.activations")
    command("train", *SMALL)
    runs = (Path(settings.outputs) / "runs").iterdir()
    computed, stored = sorted(runs, key=lambda run: "mode=online" not in run.name)
    weights = "crosscoder/crosscoder.safetensors"
    assert (computed / weights).read_bytes() == (stored / weights).read_bytes()
    assert lines_of(computed) == lines_of(stored)
    lines = [json.loads(line) for line in (computed / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 50 and "val/variance_explained/tuned" in lines[-1]
