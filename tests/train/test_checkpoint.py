"""Checkpoints appear whole, incomplete ones are ignored, foreign ones refused."""

from __future__ import annotations

import json
import logging
import resource
from contextlib import contextmanager

import pytest
import torch

from extract.errors import BadInput
from train.checkpoint import Checkpoints
from train.engine import TrainingState
from train.folder import publishing_folder


def state_after(steps, size=5):
    tensors = {"weights": torch.full((size,), float(steps)), "silent_tokens": torch.arange(3)}
    return TrainingState(tensors, {"steps_done": steps, "threshold": 0.1 + 0.2 * steps})


def checkpoints_of(folder, keep=2, **identity):
    return Checkpoints(folder / "checkpoints", keep, {"crosscoder.k": 3, "data": ["a", "b"], **identity})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_is_loaded_and_the_last_n_are_kept(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    assert checkpoints.load() is None
    for steps in (5, 10, 15):
        checkpoints.save(state_after(steps))
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    loaded = checkpoints_of(tmp_path).load()
    assert loaded.values == {"steps_done": 15, "threshold": 0.1 + 0.2 * 15}
    assert torch.equal(loaded.tensors["weights"], torch.full((5,), 15.0))
    assert loaded.tensors["silent_tokens"].dtype == torch.int64


@pytest.mark.parametrize("damage", ["partial", "no values", "cut values", "no tensors", "cut tensors"])
def test_an_incomplete_one_is_ignored_and_named(tmp_path, caplog, damage):
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.save(state_after(5))
    checkpoints.save(state_after(10))
    newest = tmp_path / "checkpoints" / "step-00000010"
    tensors, values = newest / "state.safetensors", newest / "state.json"
    if damage == "partial":
        newest.rename(newest.with_name("step-00000010.partial"))
    elif damage == "no values":
        values.unlink()
    elif damage == "cut values":
        values.write_text(values.read_text()[:-20])
    elif damage == "no tensors":
        tensors.unlink()
    else:
        tensors.write_bytes(tensors.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load().values["steps_done"] == 5
    assert "step-00000010" in caplog.text


def test_other_settings_are_refused_by_name(tmp_path):
    checkpoints_of(tmp_path).save(state_after(5))
    with pytest.raises(BadInput) as error:
        checkpoints_of(tmp_path, **{"crosscoder.k": 4, "training.lr": 0.1}).load()
    assert "crosscoder.k: 3 there, 4 now" in str(error.value)
    assert "training.lr: None there, 0.1 now" in str(error.value)
    assert "data" not in str(error.value).split("(")[1].split(")")[0]


@contextmanager
def files_of_at_most(size):
    """The kernel refuses larger files, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_oserror_that_names_the_folder_and_loses_nothing(tmp_path):
    checkpoints = checkpoints_of(tmp_path, keep=1)
    checkpoints.save(state_after(5))
    with files_of_at_most(10_000), pytest.raises(OSError, match="step-00000010"):
        checkpoints.save(state_after(10, size=100_000))
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoints.load().values["steps_done"] == 5


def test_an_interrupted_folder_leaves_what_was_there(tmp_path):
    folder = tmp_path / "folder"
    with publishing_folder(folder) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(RuntimeError), publishing_folder(folder) as partial:
        (partial / "file").write_text("new")
        raise RuntimeError
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_values_are_json(tmp_path):
    checkpoints_of(tmp_path).save(state_after(5))
    values = json.loads((tmp_path / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert values["values"]["steps_done"] == 5


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["header", "number"])
def test_a_damaged_one_of_the_right_size_is_ignored_and_named(tmp_path, caplog, damage):
    checkpoints = checkpoints_of(tmp_path, keep=3)
    for steps in (5, 10, 15):
        checkpoints.save(state_after(steps))
    for steps in (10, 15):
        tensors = tmp_path / "checkpoints" / f"step-{steps:08d}" / "state.safetensors"
        if damage == "header":
            tensors.write_bytes(bytes(tensors.stat().st_size))
        else:
            flip_last_byte(tensors)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load().values["steps_done"] == 5
    assert "step-00000010" in caplog.text and "step-00000015: the sha256" in caplog.text


def test_a_damaged_later_one_does_not_push_out_an_intact_one(tmp_path):
    checkpoints = checkpoints_of(tmp_path, keep=1)
    checkpoints.save(state_after(15))
    flip_last_byte(tmp_path / "checkpoints" / "step-00000015" / "state.safetensors")
    checkpoints.save(state_after(10))
    assert checkpoints.load().values["steps_done"] == 10
    checkpoints.save(state_after(20))
    assert names(tmp_path) == ["step-00000020"]


def test_none_intact_is_an_error_and_nothing_published_is_none(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    (tmp_path / "checkpoints" / "step-00000005.partial").mkdir(parents=True)
    assert checkpoints.load() is None
    for steps in (5, 10):
        checkpoints.save(state_after(steps))
    flip_last_byte(tmp_path / "checkpoints" / "step-00000005" / "state.safetensors")
    (tmp_path / "checkpoints" / "step-00000010" / "state.json").write_text("{}")
    with pytest.raises(BadInput, match="No checkpoint in .* is intact.*delete .*checkpoints to train from the start"):
        checkpoints.load()
    assert names(tmp_path) == ["step-00000005", "step-00000010"]
