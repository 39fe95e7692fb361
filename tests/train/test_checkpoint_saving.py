"""Saving goes on while training does; what fails on one rank fails on all, and costs no checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from planted_states import assert_holds, checkpoints_of, loaded_step, names, state_of
from rank_groups import on_ranks

from train import checkpoint, saving
from train.pieces import Piece
from train.saving import Saving
from train.world import World


def changed_after_save(world, folder):
    checkpoints, state = checkpoints_of(folder, world), state_of(world.everyone.rank, world.everyone.size, 5)
    checkpoints.save(state)
    for piece in state.tensors.values():
        piece.rows.fill_(99)
    checkpoints.close()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_next_step_may_change_the_state_at_once(tmp_path, num_ranks):
    on_ranks(num_ranks, changed_after_save, tmp_path)
    assert_holds(checkpoints_of(tmp_path, World.alone("cpu")).load(), 5)


def saved_late_by_rank_1(world, folder):
    """Names on disk when rank 0 had saved and rank 1 not yet, and when both had."""
    checkpoints, state = checkpoints_of(folder, world), state_of(world.everyone.rank, 2, 5)
    found = None
    if world.everyone.rank == 0:
        checkpoints.save(state)
        found = (folder / "checkpoints" / "step-00000005").exists()
        world.tell("go", "1")
    else:
        world.told("go")
        checkpoints.save(state)
    checkpoints.close()
    return found, names(folder)


def test_save_returns_before_the_others_have_written_and_nothing_is_published_before(tmp_path):
    assert on_ranks(2, saved_late_by_rank_1, tmp_path) == [
        (False, ["step-00000005"]),
        (None, ["step-00000005"]),
    ]


@contextmanager
def files_of_at_most(size):
    """The kernel refuses larger files, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_state_of(rank, num_ranks, steps):
    state = state_of(rank, num_ranks, steps)
    state.tensors["large"] = Piece(torch.ones(100_000), 100_000 * rank, 100_000 * num_ranks)
    return state


def saved_to_a_full_disk(world, folder, full_rank, then):
    """The error that each rank meets, and whether a later save with space is fine."""
    rank, num_ranks = world.everyone.rank, world.everyone.size
    checkpoints = checkpoints_of(folder, world, keep=1)
    checkpoints.save(state_of(rank, num_ranks, 5))
    checkpoints.wait()
    with files_of_at_most(50_000 if rank == full_rank else resource.RLIM_INFINITY):
        checkpoints.save(large_state_of(rank, num_ranks, 10))
        with pytest.raises(OSError) as error:
            checkpoints.save(state_of(rank, num_ranks, 15)) if then == "save" else checkpoints.close()
    left = names(folder)
    world.tell(f"looked/{rank}", "1")
    for other in range(num_ranks):
        world.told(f"looked/{other}")
    checkpoints.save(state_of(rank, num_ranks, 20))
    checkpoints.close()
    return type(error.value), str(error.value), left


@pytest.mark.parametrize("then", ["save", "close"])
@pytest.mark.parametrize(("num_ranks", "full_rank"), [(1, 0), (3, 0), (3, 2)])
def test_a_full_disk_on_one_rank_is_an_oserror_on_all_and_loses_nothing(tmp_path, num_ranks, full_rank, then):
    for kind, message, left in on_ranks(num_ranks, saved_to_a_full_disk, tmp_path, full_rank, then):
        assert kind is OSError and "File too large" in message and "step-00000010" in message
        assert (f"(rank {full_rank})" in message) == (num_ranks > 1)
        assert left == ["step-00000005"]
    assert names(tmp_path) == ["step-00000020"]
    assert on_ranks(num_ranks, loaded_step, tmp_path) == [20] * num_ranks


def saved_where_a_file_is(world, folder):
    (folder / "checkpoints").touch()
    checkpoints = checkpoints_of(folder, world)
    checkpoints.save(state_of(world.everyone.rank, world.everyone.size, 5))
    with pytest.raises(OSError, match="step-00000005"):
        checkpoints.close()
    checkpoints.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_folder_that_cannot_be_made_is_an_error_on_all_ranks_once(tmp_path, num_ranks):
    on_ranks(num_ranks, saved_where_a_file_is, tmp_path)


def one_fails_to_copy(world, folder):
    checkpoints, state = checkpoints_of(folder, world), state_of(world.everyone.rank, 2, 5)
    if world.everyone.rank == 1:
        state.tensors["weights"] = Piece(None, 0, 11)
    checkpoints.save(state)
    with pytest.raises(OSError) as error:
        checkpoints.close()
    return str(error.value), names(folder)


def test_an_error_of_copying_is_one_of_all_ranks(tmp_path):
    for message, left in on_ranks(2, one_fails_to_copy, tmp_path):
        assert "no attribute 'shape'" in message and left == []


def seen_late(world, folder, seconds):
    """Rank 1 sees rank 0's folder only after some seconds, as on NFS; what each rank meets."""
    checkpoints, is_dir, started = checkpoints_of(folder, world), Path.is_dir, time.monotonic()
    with mock.patch.object(saving, "SEEN_S", 2.0), mock.patch.object(Path, "is_dir", autospec=True) as patched:
        late = seconds if world.everyone.rank == 1 else 0.0
        patched.side_effect = lambda path: time.monotonic() > started + late and is_dir(path)
        checkpoints.save(state_of(world.everyone.rank, 2, 5))
        try:
            checkpoints.close()
        except OSError as error:
            return str(error)
    return names(folder)


def test_a_folder_that_another_host_sees_late_is_waited_for(tmp_path):
    assert on_ranks(2, seen_late, tmp_path, 0.5) == [["step-00000005"]] * 2


def test_a_folder_that_is_never_seen_is_a_disk_not_shared(tmp_path):
    for message in on_ranks(2, seen_late, tmp_path, 1000.0):
        assert "is the disk shared by all ranks? (rank 1)" in message


def test_an_old_checkpoint_that_cannot_be_removed_costs_no_new_one(tmp_path, monkeypatch, caplog):
    checkpoints = checkpoints_of(tmp_path, World.alone("cpu"), keep=1)
    checkpoints.save(state_of(0, 1, 5))
    checkpoints.wait()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", refused)
        checkpoints.save(state_of(0, 1, 10))
        checkpoints.wait()
    assert names(tmp_path) == ["step-00000005", "step-00000010"]
    assert "step-00000010 is saved, but" in caplog.text and "Permission denied" in caplog.text
    checkpoints.save(state_of(0, 1, 15))
    checkpoints.close()
    assert names(tmp_path) == ["step-00000015"]


def refused(path, ignore_errors=False):
    if not ignore_errors:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_what_killed_processes_left_is_cleared_away(tmp_path):
    stale = tmp_path / "checkpoints" / "step-00000003.partial"
    stale.mkdir(parents=True)
    (stale / "state-00000-of-00001.safetensors").write_text("half")
    checkpoints = checkpoints_of(tmp_path, World.alone("cpu"))
    checkpoints.save(state_of(0, 1, 5))
    checkpoints.close()
    assert names(tmp_path) == ["step-00000005"]


def test_an_error_is_raised_once(tmp_path, monkeypatch):
    checkpoints = checkpoints_of(tmp_path, World.alone("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(Saving, "_written", lambda saving, folder: {"error": [28, "No space left on device"]})
        checkpoints.save(state_of(0, 1, 5))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    checkpoints.wait()
    checkpoints.save(state_of(0, 1, 10))
    checkpoints.close()
    assert names(tmp_path) == ["step-00000010"]
