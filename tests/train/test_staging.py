"""Shards that are copied to a disk of the node: once, whole, and no more than it has room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import random_store, settings_of

from extract.errors import BadInput
from tests.disks import small_disk
from train.data import ActivationPairs
from train.staging import staged
from train.trainer import train


@pytest.fixture
def settings(tmp_path):
    random_store(tmp_path / "store")
    return settings_of(tmp_path)


def with_staging(settings, folder):
    return replace(settings, data=replace(settings.data, staging=str(folder)))


def copies_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("shard-*.tar"))


def test_shards_are_copied_when_they_are_read(settings, tmp_path):
    plain = ActivationPairs.open(settings)
    local = ActivationPairs.open(with_staging(settings, tmp_path / "disk"))
    assert copies_in(tmp_path / "disk") == []
    for document in range(plain.num_documents):
        (ours, kept), (theirs, kept_plain) = local.document(document), plain.document(document)
        assert torch.equal(ours, theirs) and (kept == kept_plain).all()
        if document == 0:
            assert len(copies_in(tmp_path / "disk")) == 2  # the first shard of each model
    originals = sorted((tmp_path / "store" / "activations").rglob("shard-*.tar"))
    copies = copies_in(tmp_path / "disk")
    assert sorted(path.read_bytes() for path in copies) == sorted(path.read_bytes() for path in originals)


def test_a_run_on_copies_is_the_same_run_and_a_later_job_finds_them(settings, tmp_path):
    outputs = [tmp_path / name for name in ("plain", "first", "second")]
    runs = [train(settings, outputs[0])]
    settings = with_staging(settings, tmp_path / "disk")
    runs.append(train(settings, outputs[1]))
    copied = copies_in(tmp_path / "disk")
    times = [path.stat().st_mtime_ns for path in copied]
    runs.append(train(settings, outputs[2]))
    assert copied and [path.stat().st_mtime_ns for path in copied] == times and copies_in(tmp_path / "disk") == copied
    assert len({(run / "crosscoder.safetensors").read_bytes() for run in runs}) == 1


def test_a_damaged_original_is_not_copied(settings, tmp_path):
    pairs = ActivationPairs.open(with_staging(settings, tmp_path / "disk"))
    shard = min((tmp_path / "store" / "activations" / "tuned").rglob("shard-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadInput, match="is not the file that its manifest describes"):
        pairs.document(0)
    (copy,) = copies_in(tmp_path / "disk")
    assert copy.read_bytes() == min((tmp_path / "store" / "activations" / "base").rglob("shard-*.tar")).read_bytes()


def test_a_disk_that_is_too_small_is_refused_at_once(settings, tmp_path, monkeypatch):
    """The store holds 6 numbers of 2 bytes for each of some 430 tokens and two models: 10 kB and its headers."""
    stores = ActivationPairs.open(settings).stores
    num_bytes = sum(entry.bytes for store in stores for entry in store.manifest.shards)
    with small_disk(tmp_path / "disk", num_bytes * 3 // 4 // 1024) as disk:
        with pytest.raises(BadInput, match=rf"data.staging={disk} has 0.0 GB free, .* more nodes"):
            staged(stores, str(disk))
        for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        staged(stores, str(disk))  # of two nodes each reads half
        assert list(disk.iterdir())


def test_nothing_is_staged_without_a_folder(settings):
    stores = ActivationPairs.open(settings).stores
    assert staged(stores, None) == stores
