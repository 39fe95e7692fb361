"""Checkpoints of any ranks are read by any others; damaged ones are passed over, and those of other runs refused."""

from __future__ import annotations

import json
import logging

import pytest
from planted_states import assert_holds, checkpoints_of, loaded_step, names, planted, save_all, state_of
from rank_groups import on_ranks

from extract.errors import BadInput
from train import checkpoint
from train.folder import publishing_folder
from train.pieces import Piece
from train.world import World


@pytest.fixture
def alone():
    return World.alone("cpu")


def test_the_newest_is_loaded_and_the_last_n_are_kept(tmp_path, alone):
    checkpoints = checkpoints_of(tmp_path, alone)
    assert checkpoints.load() is None
    for steps in (5, 10, 15):
        checkpoints.save(state_of(0, 1, steps))
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    assert_holds(checkpoints_of(tmp_path, alone).load(), 15)


def test_every_mth_is_kept_besides_the_last_n(tmp_path, alone):
    save_all(alone, tmp_path, range(5, 45, 5), keep=1, keep_every=15)
    assert names(tmp_path) == ["step-00000015", "step-00000030", "step-00000040"]
    save_all(alone, tmp_path, [45, 50], keep=2, keep_every=15)
    assert names(tmp_path) == [f"step-{steps:08d}" for steps in (15, 30, 45, 50)]


def test_steps_are_ordered_as_numbers(tmp_path, alone):
    save_all(alone, tmp_path, [99_999_999, 100_000_000])
    assert loaded_step(alone, tmp_path) == 100_000_000


@pytest.mark.parametrize("written_by", [1, 2, 3, 4])
def test_what_any_ranks_wrote_any_others_read(tmp_path, written_by):
    on_ranks(written_by, save_all, tmp_path, [5, 10])
    shards = [f"state-{rank:05d}-of-{written_by:05d}.safetensors" for rank in range(written_by)]
    assert names(tmp_path) == ["step-00000005", "step-00000010"]
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step-00000010").iterdir()) == [
        *shards,
        "state.json",
    ]
    for read_by in (1, 2, 3, 4):
        assert on_ranks(read_by, loaded_step, tmp_path) == [10] * read_by


def rows_read(world, folder, first, stop):
    return checkpoints_of(folder, world).load().rows("weights", first, stop).tolist()


def test_a_rank_reads_the_rows_that_it_asks_for(tmp_path):
    on_ranks(3, save_all, tmp_path, [5])
    for first, stop in [(0, 1), (0, 11), (1, 2), (4, 9), (10, 11)]:
        for rows in on_ranks(2, rows_read, tmp_path, first, stop):
            assert rows == planted("weights", 5)[first:stop].tolist()


def files_hashed(world, folder):
    checkpoints, hashed, plain = checkpoints_of(folder, world), [], checkpoint.sha256_of
    checkpoint.sha256_of = lambda path: (hashed.append(path.name), plain(path))[1]
    try:
        checkpoints.load()
    finally:
        checkpoint.sha256_of = plain
    return len(hashed)


@pytest.mark.parametrize(("read_by", "expected"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1, 1, 1, 1])])
def test_ranks_divide_the_hashing(tmp_path, read_by, expected):
    on_ranks(4, save_all, tmp_path, [5])
    assert on_ranks(read_by, files_hashed, tmp_path) == expected


FILES = [*(f"state-{rank:05d}-of-00003.safetensors" for rank in range(3)), "state.json"]


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-2])
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    else:
        at = len(content) // 2 if how == "altered in the middle" else len(content) - 1
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def loaded_with_log(world, folder):
    """Steps done at what is loaded, or the BadInput, and what is logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("train.checkpoint")
    logger.addHandler(handler)
    try:
        return loaded_step(world, folder), "\n".join(lines)
    except BadInput as error:
        return str(error), "\n".join(lines)
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("how", ["missing", "truncated", "zeros", "altered in the middle", "altered at the end"])
@pytest.mark.parametrize("file", FILES)
def test_one_that_is_damaged_anywhere_is_never_loaded_and_is_named(tmp_path, file, how):
    on_ranks(3, save_all, tmp_path, [5, 10])
    damage(tmp_path / "checkpoints" / "step-00000010" / file, how)
    (first, log), *others = on_ranks(2, loaded_with_log, tmp_path)
    assert first == 5 and [steps for steps, _ in others] == [5]
    assert "Ignoring the" in log and "step-00000010" in log and file in log
    assert all(log == "" for _, log in others)


def test_a_number_altered_in_the_values_is_noticed(tmp_path, alone, caplog):
    save_all(alone, tmp_path, [5, 10])
    contents = tmp_path / "checkpoints" / "step-00000010" / "state.json"
    text = contents.read_text()
    assert text.count('"threshold": 2.1') == 1
    contents.write_text(text.replace('"threshold": 2.1', '"threshold": 2.2'))
    assert loaded_step(alone, tmp_path) == 5
    assert "step-00000010: state.json was altered" in caplog.text


@pytest.mark.parametrize("name", ["step-00000010.partial", "step-00000010.replaced", "step-10"])
def test_an_unpublished_one_is_ignored_and_named(tmp_path, alone, caplog, name):
    save_all(alone, tmp_path, [5, 10])
    newest = tmp_path / "checkpoints" / "step-00000010"
    newest.rename(newest.with_name(name))
    assert loaded_step(alone, tmp_path) == 5
    assert f"{name}: it was not published" in caplog.text


def test_one_of_another_release_is_named(tmp_path, alone, caplog):
    save_all(alone, tmp_path, [5, 10])
    contents = tmp_path / "checkpoints" / "step-00000010" / "state.json"
    contents.write_text(json.dumps(json.loads(contents.read_text()) | {"format_version": 2}))
    assert loaded_step(alone, tmp_path) == 5
    assert "step-00000010: format version 2, this release reads 3" in caplog.text


def test_a_damaged_later_one_does_not_push_out_an_intact_one(tmp_path, alone):
    save_all(alone, tmp_path, [15], keep=1)
    damage(tmp_path / "checkpoints" / "step-00000015" / "state-00000-of-00001.safetensors", "altered at the end")
    save_all(alone, tmp_path, [10], keep=1)
    assert loaded_step(alone, tmp_path) == 10
    save_all(alone, tmp_path, [20], keep=1)
    assert names(tmp_path) == ["step-00000020"]


def test_none_intact_is_an_error_on_all_ranks_and_nothing_published_is_none(tmp_path):
    (tmp_path / "checkpoints" / "step-00000005.partial").mkdir(parents=True)
    assert on_ranks(2, loaded_step, tmp_path) == [None, None]
    on_ranks(2, save_all, tmp_path, [5, 10])
    damage(tmp_path / "checkpoints" / "step-00000005" / "state-00001-of-00002.safetensors", "altered at the end")
    damage(tmp_path / "checkpoints" / "step-00000010" / "state.json", "truncated")
    for message, _ in on_ranks(2, loaded_with_log, tmp_path):
        assert "No checkpoint in" in message and "is intact" in message and "to train from the start" in message
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def loaded_with_identity(world, folder, identity):
    with pytest.raises(BadInput) as error:
        checkpoints_of(folder, world, **identity).load()
    return str(error.value)


def test_other_settings_or_data_are_refused_by_name_on_all_ranks(tmp_path):
    on_ranks(1, save_all, tmp_path, [5])
    now = {"crosscoder.k": 4, "training.lr": 0.1, "data": ["a", "c"]}
    for message in on_ranks(2, loaded_with_identity, tmp_path, now):
        assert "crosscoder.k: 3 there, 4 now" in message
        assert "training.lr: None there, 0.1 now" in message
        assert "data: ['a', 'b'] there, ['a', 'c'] now" in message
    (message,) = on_ranks(1, loaded_with_identity, tmp_path, {"crosscoder.k": 4})
    assert "crosscoder.k" in message and "data: " not in message


def test_pieces_that_do_not_cover_a_tensor_are_not_published(tmp_path, alone):
    checkpoints, state = checkpoints_of(tmp_path, alone), state_of(0, 1, 5)
    state.tensors["weights"] = Piece(planted("weights", 5)[:10], 0, 11)
    checkpoints.save(state)
    with pytest.raises(ValueError, match="of the 11 rows of weights these are there.*: 0 to 10"):
        checkpoints.close()
    assert names(tmp_path) == []


def test_an_interrupted_folder_leaves_what_was_there(tmp_path):
    folder = tmp_path / "folder"
    with publishing_folder(folder) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(RuntimeError), publishing_folder(folder) as partial:
        (partial / "file").write_text("new")
        raise RuntimeError
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
