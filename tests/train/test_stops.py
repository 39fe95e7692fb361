"""Signals, and the ranks that all stop at the same step: on real processes, with real data."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from lone_ranks import LoneRanks
from planted import random_store, settings_of
from pool import pool_of

from train import stops
from train.data import ActivationPairs
from train.ending import FailedElsewhere
from train.loader import HostSlot, Loader
from train.stops import EXIT_STOPPED, StopRequest, Turns
from train.stream import BatchStream
from train.trainer import train


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_a_request_and_its_echo_none(monkeypatch, number):
    monkeypatch.setattr(stops, "AGAIN_S", 0.2)
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as launchers do
        assert request.requested
    assert signal.getsignal(number) == before


def test_a_later_signal_acts_as_usual(monkeypatch):
    monkeypatch.setattr(stops, "AGAIN_S", 0.05)
    monkeypatch.setattr(signal, "default_int_handler", signal.default_int_handler)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    random_store(folder / "store")
    return folder


class Failing:
    """Data of which reads fail from some number on."""

    def __init__(self, data, after):
        self._data, self._left = data, after

    def __getattr__(self, name):
        return getattr(self._data, name)

    def read(self, rows_B, into):
        self._left -= 1
        if self._left < 0:
            raise OSError("the disk is gone")
        self._data.read(rows_B, into)


def turns_of(world, folder, stopping=None, failing=None):
    """The number of batches that a rank gets, and what failed: rank `stopping[0]` is asked to stop in its turn
    `stopping[1]`, the data of `failing[0]` fails after `failing[1]` reads.
    """
    settings, everyone = settings_of(folder), world.everyone
    data = ActivationPairs.open(settings)
    if failing and everyone.rank == failing[0]:
        data = Failing(data, failing[1])
    stream = BatchStream(data, 0, 32, settings.data, everyone.rank, everyone.size)
    request, taken = StopRequest(), 0
    with Loader(stream, 5, 25, world.device, 2, lambda: request.requested) as batches:
        turns = Turns(batches, 5, 25, request, world)
        for _ in turns:
            time.sleep(0.01 * everyone.rank)
            assert world.step == 5 + taken
            taken += 1
            request.requested |= stopping == (everyone.rank, taken)
    return taken, turns.failure and type(turns.failure)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_turns_go_on_to_the_end(study, num_ranks):
    assert pool_of(num_ranks).run(turns_of, study) == [(20, None)] * num_ranks


@pytest.mark.parametrize(("num_ranks", "stopping"), [(1, (0, 7)), (2, (0, 7)), (2, (1, 7)), (4, (3, 1)), (4, (0, 20))])
def test_all_stop_after_the_same_step_soon_after_one_is_asked_to(study, num_ranks, stopping):
    (taken, failure), *others = pool_of(num_ranks).run(turns_of, study, stopping)
    assert others == [(taken, failure)] * (num_ranks - 1) and failure is None
    assert stopping[1] <= taken <= min(20, stopping[1] + (num_ranks > 1))


@pytest.mark.parametrize(("num_ranks", "failing"), [(1, (0, 7)), (2, (1, 7)), (4, (0, 0))])
def test_data_that_fails_on_one_rank_ends_all_before_the_same_step(study, num_ranks, failing):
    found = pool_of(num_ranks).run(turns_of, study, None, failing)
    assert found == [(failing[1], OSError if r == failing[0] else FailedElsewhere) for r in range(num_ranks)]


def training(settings, folder, fault=None):
    """One rank of a run. The second one's data is nan in step 12, or fails there, by the name of the fault."""
    take, read, count = HostSlot.take, HostSlot.read, [0]

    def spoilt(slot):
        x_BMD, token_B = take(slot)
        count[0] += 1
        return x_BMD * (torch.nan if count[0] == 13 else 1), token_B

    def failing(slot, rows_B, number_B):
        count[0] += 1
        if count[0] > 12:
            raise OSError("the disk is gone")
        read(slot, rows_B, number_B)

    if os.environ["RANK"] == "1" and fault == "nan":
        HostSlot.take = spoilt
    if os.environ["RANK"] == "1" and fault == "gone":
        HostSlot.read = failing
    train(settings, folder)


def run_of(study, num_steps=24):
    settings = settings_of(study)
    settings.engine.name, settings.training.num_tokens = "latent", 32 * num_steps
    return settings


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all_and_others_continue(study, tmp_path, number):
    run, settings = tmp_path / "run", run_of(study, 2000)
    settings.training.validate_every, settings.training.checkpoint_every = 0, 0
    with LoneRanks(tmp_path, 2, training, settings, run) as ranks:
        while not (run / "metrics.jsonl").exists() or len(steps_of(run)) < 5:
            assert ranks.processes[1].is_alive(), ranks.errors
            time.sleep(0.05)
        os.kill(ranks.processes[1].pid, number)
        assert ranks.statuses(0, 1) == [EXIT_STOPPED, EXIT_STOPPED], ranks.errors
        assert "error" not in ranks.errors.lower()
    (step,) = saved(run)
    assert steps_of(run) == list(range(1, step + 1)) and step < 2000


def test_a_step_that_is_not_finite_on_one_rank_ends_all_with_one_message(study, tmp_path):
    run = tmp_path / "run"
    with LoneRanks(tmp_path, 2, training, run_of(study), run, "nan") as ranks:
        assert ranks.statuses(0, 1) == [2, 2], ranks.errors
        assert ranks.errors.count("error: Training diverged at step 12 (tokens 384 to 416 of the run, epoch 1)") == 1
        assert "Traceback" not in ranks.errors
    assert saved(run) == [5, 10]
    about = json.loads((run / "diverged.json").read_text())
    assert about["step"] == 12 and sum(map(len, about["documents"].values())) == 32


def test_data_that_fails_on_one_rank_costs_no_step(study, tmp_path):
    run = tmp_path / "run"
    with LoneRanks(tmp_path, 2, training, run_of(study), run, "gone") as ranks:
        assert ranks.statuses(0, 1) == [1, 1], ranks.errors
        assert ranks.errors.count("Traceback") == 1 and "OSError: the disk is gone" in ranks.errors
    assert saved(run) == [10, 12] and steps_of(run) == list(range(1, 13))
