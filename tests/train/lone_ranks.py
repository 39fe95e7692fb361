"""Ranks as processes of their own, for tests that stop, kill and interrupt them; rank 0 hosts their store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from pool import environment

from extract.command import _report
from extract.errors import BadInput
from train.config import EngineConfig
from train.world import World

ROOT = Path(__file__).resolve().parents[2]


class LoneRanks:
    """`function(*arguments)` on each rank; they write errors to files in `folder`. All are killed in the end."""

    def __init__(self, folder, num_ranks, function, *arguments):
        context = get_context("forkserver")
        context.set_forkserver_preload(["lone_ranks", "train.trainer"])
        self._errors = [folder / f"errors-{rank}.txt" for rank in range(num_ranks)]
        port = free_port()
        self.processes = [
            context.Process(target=lone_rank, args=(self._errors[rank], variables, function, arguments))
            for rank, variables in enumerate(environment(rank, num_ranks, port) for rank in range(num_ranks))
        ]

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.join()

    def statuses(self, *ranks, timeout=60):
        """The exit statuses of these ranks, which must end."""
        end_at = time.monotonic() + timeout
        for rank in ranks:
            self.processes[rank].join(max(0.0, end_at - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    @property
    def errors(self):
        """What all of them wrote to standard error."""
        return "".join(path.read_text() for path in self._errors)


def lone_rank(errors, variables, function, arguments):
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update({**variables, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BadInput as error:
        sys.exit(_report(error))


def in_world(function, timeout_s):
    """`function(world)` of a rank that has reached all others."""
    with World.open(EngineConfig(name="fsdp", timeout_s=timeout_s), "cpu") as world:
        world.everyone.sum(torch.ones(1), "the connections of all")
        function(world)


def torchrun(num_ranks, arguments, *options):
    """What `arguments` start, a script or -m and a module, on ranks of torchrun; to be given to `end`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    return subprocess.Popen(
        [*launcher, *options, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process):
    """Kill a launcher with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
