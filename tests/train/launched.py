"""Runs of several ranks in real processes, forked from one that has imported all, so that starting takes no seconds.

python tests/train/launched.py FOLDER ENGINE      one rank of a run, under torchrun
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from equal import positive
from planted import settings_of
from pool import environment

from train.trainer import train

IMPORTED = ["train.trainer", "train.fsdp", "train.latent", "train.zero", "deepspeed", "torch._dynamo"]
NUM_STEPS, TOKENS_PER_STEP, NUM_LANES = 40, 48, 12
TIMEOUT_S = 240.0


def run_settings(folder, engine):
    """A run that 1, 2, 3 and 4 ranks can take: latents die, and a checkpoint is saved after every third step."""
    settings = settings_of(folder)
    settings.engine.name = engine
    settings.seed = 1  # of which no step's cut runs between scores that float32 confuses
    settings.data.num_lanes = NUM_LANES
    settings.training.num_tokens_per_step = TOKENS_PER_STEP
    settings.training.num_tokens = TOKENS_PER_STEP * NUM_STEPS
    settings.training.checkpoint_every = 3
    return settings


def rank_of_a_run(settings, folder, variables, dtype):
    os.environ.update(variables)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    train(settings, folder)


class Launch:
    """A run on `num_ranks` ranks, as a launcher starts it and, when one of them is gone, ends it."""

    def __init__(self, folder, name, engine, num_ranks, dtype=torch.float32):
        context = get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.run = folder / "runs" / name
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables = [environment(rank, num_ranks, self._store.port) for rank in range(num_ranks)]
        arguments = run_settings(folder, engine), self.run
        self._ranks = [context.Process(target=rank_of_a_run, args=(*arguments, own, dtype)) for own in variables]
        for process in self._ranks:
            process.start()

    def finish(self):
        """Wait until all ranks have ended well."""
        end = time.monotonic() + TIMEOUT_S
        for process in self._ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = self._end()
        assert codes == [0] * len(codes)

    def kill_one(self, rank, step, delay=0.0):
        """End one rank with SIGKILL some time after `step` steps were logged, then the others."""
        wait_for(self.run, step, lambda: all(process.is_alive() for process in self._ranks))
        time.sleep(delay)
        self._ranks[rank].kill()
        self._ranks[rank].join()
        code = self._ranks[rank].exitcode
        self._end()
        assert code == -9, f"rank {rank} ended with {code} before it was killed"

    def _end(self):
        for process in self._ranks:
            process.kill()
            process.join()
        return [process.exitcode for process in self._ranks]


def wait_for(run, step, is_running):
    """Until `step` steps were logged by a run that goes on."""
    end = time.monotonic() + TIMEOUT_S
    while last_step(run) < step:
        assert is_running(), "the run ended before a rank was killed"
        assert time.monotonic() < end, f"step {step} was not reached within {TIMEOUT_S:g} s"
        time.sleep(0.001)


def last_step(run):
    """The step of the last whole line of the metrics; 0 where there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max([json.loads(line)["step"] for line in lines if line.endswith("\n")], default=0)


def lines_of(run):
    """The metrics of every logged step, without those of speed and memory; of histograms the number of values."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]
    return [{k: sum(v["counts"]) if isinstance(v, dict) else v for k, v in line.items()} for line in kept]


def saved_lines(run):
    """The lines of the metrics, those of speed among them, that the newest published checkpoint vouches for."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-????????/state.json")]
    return (run / "metrics.jsonl").read_text().splitlines()[: max(steps, default=0)]


def differences(first, second):
    """The largest |a - b| / max(|a|, |b|) of every metric over all steps, of explained variance of what it leaves; the
    steps and names must be equal.
    """
    largest = {}
    for ours, theirs in itertools.zip_longest(map(positive, first), map(positive, second), fillvalue={}):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name, value in ours.items():
            scale = max(abs(value), abs(theirs[name]))
            largest[name] = max(largest.get(name, 0.0), abs(value - theirs[name]) / scale if scale else 0.0)
    return largest


if __name__ == "__main__":
    torch.set_num_threads(1)
    study = Path(sys.argv[1])
    train(run_settings(study, sys.argv[2]), study / "runs" / "torchrun")
