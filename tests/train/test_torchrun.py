"""Signals to torchrun itself: it passes them on to all ranks, which save, and the same command continues."""

from __future__ import annotations

import json
import signal
import time

import pytest
from lone_ranks import end, torchrun
from planted import random_store, train_arguments

TOKENS = 36  # of a step: for 2 and for 3 ranks
RUN = ["engine=latent", f"training.num_tokens_per_step={TOKENS}", "data.num_lanes=6", "training.checkpoint_every=0"]
EVERY_SIGNAL = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun itself would die of the last one else


def steps_of(study):
    """The steps that are logged whole."""
    texts = [path.read_text() for path in study.glob("runs/*/metrics.jsonl")]
    return [json.loads(line)["step"] for text in texts for line in text.split("\n")[:-1]]


def stopped(study, num_ranks, number, *options):
    """What torchrun and its ranks wrote to standard error when it got signal `number` in the midst of a run."""
    before = len(steps_of(study))
    process = torchrun(num_ranks, [*train_arguments(study, TOKENS * 20_000), *RUN], "--standalone", *options)
    try:
        while len(steps_of(study)) < before + 10:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 1, errors  # whatever its ranks end with
    return errors


@pytest.mark.parametrize(
    ("number", "options"),
    [
        pytest.param(signal.SIGTERM, [], id="SIGTERM"),
        pytest.param(signal.SIGUSR1, ["--signals-to-handle", EVERY_SIGNAL], id="SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_torchrun_saves_on_all_ranks_and_others_continue(tmp_path, number, options):
    random_store(tmp_path / "store")
    last = 0
    for num_ranks in (2, 3):
        errors = stopped(tmp_path, num_ranks, number, *options)
        assert (f"step-{last:08d}" in errors) == (num_ranks == 3)  # where it resumed
        last = len(steps_of(tmp_path))
        assert f"Stopped after step {last}; the same command continues" in errors
        assert steps_of(tmp_path) == list(range(1, last + 1))
        newest = max(tmp_path.glob("runs/*/checkpoints/step-*"))
        assert newest.name == f"step-{last:08d}"
        assert len(list(newest.glob("*.safetensors"))) == num_ranks
