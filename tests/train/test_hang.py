"""Ranks that hang, stop, die, fail or leave: all of them end, soon, with one message and one status."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial

import pytest
import torch
from lone_ranks import LoneRanks, end, free_port, in_world, torchrun
from planted import random_store, settings_of

from extract.errors import BadInput
from train.crosscoder import Crosscoder
from train.meeting import ALONE, Meeting
from train.tracking import Tracker
from train.trainer import train
from train.watchdog import Wait, Watchdog


def collective(world):
    world.everyone.sum(torch.ones(3), "the sum of gradients")


def hanging(world):
    world.step = 12
    if world.everyone.rank == 1:
        with world.doing("waiting for its batch"):
            time.sleep(100)
    collective(world)


def stopping(world):
    world.step = 12
    if world.everyone.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    collective(world)


def parting(world):
    world.step = 12 + world.everyone.rank
    if world.everyone.rank:
        world.told("what nobody tells")
    world.everyone.sum(torch.ones(3), "the first sum")


def dying(world):
    world.step = 12
    if world.everyone.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collective(world)


def failing(world):
    if world.everyone.rank == 1:
        raise ZeroDivisionError("rank 1 alone")
    collective(world)


def refusing(world):
    raise BadInput("all ranks find this")


def device_failing(world):
    """The main thread waits for what a device that has failed will never do."""
    world.step = 12
    if world.everyone.rank == 1:
        queue(world, lambda: torch.empty(1).view(2))
    collective(world)
    world.told("what nobody tells")


def device_hanging(world):
    world.step = 12
    if world.everyone.rank == 1:
        queue(world, lambda: False)
    world.told("what nobody tells")


def queue(world, is_over):
    """As a collective on a GPU, of which `is_over` tells."""
    world._watchdog._queued.append(Wait("gathering weights", world.step, time.monotonic(), True, is_over))


def leaving(world):
    time.sleep(world.everyone.rank / 2)
    collective(world)
    sys.exit(75)


def ends(folder, function, timeout_s=60, num_ranks=3):
    """The exit statuses of all ranks, and what they wrote to standard error, together."""
    with LoneRanks(folder, num_ranks, in_world, function, timeout_s) as ranks:
        return ranks.statuses(*range(num_ranks)), ranks.errors


def test_a_rank_that_waits_too_long_ends_all_and_says_who_is_missing(tmp_path):
    statuses, errors = ends(tmp_path, hanging, timeout_s=2)
    assert statuses == [70, 70, 70]
    assert errors.count("error:") == 1
    assert "waited longer than engine.timeout_s=2 s in step 12 at 'the sum of gradients'" in errors
    assert "Missing: rank 1, in step 12 at 'waiting for its batch' for " in errors


def test_a_stopped_process_is_named(tmp_path):
    with LoneRanks(tmp_path, 3, in_world, stopping, 2) as ranks:
        assert ranks.statuses(0, 2) == [70, 70]
        assert ranks.errors.count("error:") == 1
    assert "Missing: rank 1, which does not answer: its process has ended or is stopped." in ranks.errors


def test_a_rank_that_is_in_another_step_is_named_with_it(tmp_path):
    statuses, errors = ends(tmp_path, parting, timeout_s=2, num_ranks=2)
    assert statuses == [70, 70]
    assert "Rank 0 waited longer than engine.timeout_s=2 s in step 12 at 'the first sum'" in errors
    assert "Missing: rank 1, in step 13 at 'work of its own'" in errors


def test_a_killed_rank_ends_the_others_long_before_the_timeout(tmp_path):
    statuses, errors = ends(tmp_path, dying, timeout_s=600)
    assert statuses == [70, -9, 70]
    assert errors.count("error:") == 1
    assert "Rank 1 of 3 ended without a word, which broke step 12 of the others." in errors
    assert "Traceback" not in errors


def without_rank_0(reached, world):
    if world.is_main:
        reached.touch()
        time.sleep(1000)
    collective(world)


def test_where_rank_0_takes_the_store_with_it_the_others_end_all_the_same(tmp_path):
    reached = tmp_path / "reached"
    with LoneRanks(tmp_path, 3, in_world, partial(without_rank_0, reached), 600) as ranks:
        while not reached.exists():
            assert ranks.processes[0].is_alive(), ranks.errors
            time.sleep(0.05)
        ranks.processes[0].kill()
        assert ranks.statuses(1, 2) == [70, 70]
    assert "lost the others: rank 0, or what launched the ranks, has ended." in ranks.errors


def test_the_error_of_one_rank_ends_all_and_is_shown_once(tmp_path):
    statuses, errors = ends(tmp_path, failing)
    assert statuses == [1, 1, 1]
    assert errors.count("Traceback") == 1 and "rank 1 alone" in errors


def test_an_error_that_all_ranks_meet_is_said_once(tmp_path):
    statuses, errors = ends(tmp_path, refusing)
    assert statuses == [2, 2, 2]
    assert errors == "error: all ranks find this\n"


def test_a_device_that_fails_ends_all_even_where_the_host_waits(tmp_path):
    statuses, errors = ends(tmp_path, device_failing)
    assert statuses == [70, 70, 70]
    assert errors.count("error:") == 1
    assert "Rank 1 found its device failed in step 12: shape '[2]' is invalid" in errors


def test_a_device_that_hangs_ends_all_though_no_host_waits_for_a_collective(tmp_path):
    statuses, errors = ends(tmp_path, device_hanging, timeout_s=2, num_ranks=2)
    assert statuses == [70, 70]
    assert "Rank 1 waited longer than engine.timeout_s=2 s in step 12 at 'gathering weights'" in errors
    assert "Missing: rank 0, in step 12 at 'work of its own'" in errors


class Clock:
    """A device's queue, and the time, as a test sets them: collective i is over once `num_over` is more than i."""

    def __init__(self, monkeypatch):
        self.now, self.num_over, self.num_queued = 1000.0, 0, 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.watchdog = Watchdog(Meeting.join(ALONE, 0), timeout_s=10)

    def queue(self, what):
        number, self.num_queued = self.num_queued, self.num_queued + 1
        self.watchdog._queued.append(Wait(what, 3, self.now, True, lambda: self.num_over > number))

    def overdue_at(self, now, num_over):
        self.now, self.num_over = now, num_over
        overdue = self.watchdog._overdue()
        return overdue and overdue.what


def test_a_device_that_goes_on_is_not_overdue_however_long_its_queue(monkeypatch):
    clock = Clock(monkeypatch)
    for what in ("a", "b", "c"):
        clock.queue(what)
    assert clock.overdue_at(1009, 0) is None
    assert clock.overdue_at(1009, 1) is None  # a is over
    assert clock.overdue_at(1018, 1) is None  # b was queued 18 s ago, and its turn came 9 s ago
    assert clock.overdue_at(1019.5, 1) == "b"
    assert clock.overdue_at(1019.5, 3) is None
    clock.now = 1100.0
    clock.queue("d")
    assert clock.overdue_at(1109, 3) is None  # the device had nothing to do for long, d is queued for 9 s
    assert clock.overdue_at(1111, 3) == "d"
    assert clock.overdue_at(1111, 4) is None
    assert not clock.watchdog._queued


def test_waits_of_the_host_are_overdue_where_the_timeout_holds_for_them(monkeypatch):
    clock = Clock(monkeypatch)
    with clock.watchdog.doing("reading"), clock.watchdog.watch("a sum"):
        assert clock.overdue_at(1009, 0) is None
        assert clock.overdue_at(1011, 0) == "a sum"
    with clock.watchdog.doing("reading"):
        assert clock.overdue_at(2000, 0) is None


def test_one_process_watches_no_device(monkeypatch):
    clock = Clock(monkeypatch)
    clock.watchdog.device = torch.device("cuda", 0)
    with clock.watchdog.watch("a sum"):  # which would need a GPU
        pass
    assert not clock.watchdog._queued


def slow_to_finish(settings, folder):
    """A run whose rank 0 writes the crosscoder, and then uploads metrics, for longer than the timeout each."""
    save, close = Crosscoder.save, Tracker.close
    settings.engine.name, settings.engine.timeout_s = "latent", 3.0

    def slow_save(crosscoder, path):
        time.sleep(5)
        save(crosscoder, path)

    def slow_close(tracker):
        time.sleep(5)
        close(tracker)

    Crosscoder.save, Tracker.close = slow_save, slow_close
    train(settings, folder)


def test_rank_0_may_write_for_longer_than_the_timeout(tmp_path):
    random_store(tmp_path / "store")
    settings, run = settings_of(tmp_path), tmp_path / "run"
    settings.training.num_tokens = 32 * 2
    with LoneRanks(tmp_path, 2, slow_to_finish, settings, run) as ranks:
        assert ranks.statuses(0, 1) == [0, 0], ranks.errors
    assert Crosscoder.load(run / "crosscoder").num_models == 2


def test_ranks_leave_together_and_keep_their_status(tmp_path):
    statuses, errors = ends(tmp_path, leaving)
    assert statuses == [75, 75, 75] and errors == ""


RESTARTED = """
import os, signal
import torch
from train.config import EngineConfig
from train.world import World

with World.open(EngineConfig(name="fsdp", timeout_s=60), "cpu") as world:
    world.from_main("x")
    world.everyone.sum(torch.ones(3), "before")
    if world.place.restart == 0 and world.everyone.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for number in range(20):
        world.everyone.sum(torch.ones(3), "after")
        assert world.from_main([number, world.place.restart]) == [number, world.place.restart]
    if world.is_main:
        print("restart", world.place.restart)
"""


@pytest.mark.parametrize("with_port", [False, True])
def test_torchrun_restarts_ranks_in_place(tmp_path, with_port):
    """What the killed ranks left in the store is not taken for the word of those that follow."""
    script = tmp_path / "script.py"
    script.write_text(RESTARTED)
    options = ["--master-port", str(free_port())] if with_port else ["--standalone"]
    process = torchrun(2, [str(script)], "--max-restarts", "1", *options)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, errors
    assert output.split() == ["restart", "1"]
