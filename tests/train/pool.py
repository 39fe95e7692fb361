"""Processes that stay: each rank count has one process group, which serves all tests of a session.

    pool_of(4).run(function, *arguments) -> [result of rank 0, ..., of rank 3]

`function(world, *arguments)` is importable and runs on all ranks; what it takes and returns is pickled. The ranks find
each other as under torchrun, through a store that this process holds, so no port is chosen in advance. A call that
fails or takes too long ends the processes, and the next one starts afresh: a rank may have been left in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import tempfile
import time
import traceback
from multiprocessing import connection, get_context
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from train.config import EngineConfig
from train.world import World

START_SECONDS, GRACE_SECONDS = 120.0, 5.0
_pools: dict[int, Pool] = {}


def pool_of(num_ranks):
    """The pool of `num_ranks` processes, started when it is first asked for, and again after an error."""
    if num_ranks not in _pools or not _pools[num_ranks].is_alive:
        _pools[num_ranks] = Pool(num_ranks)
    return _pools[num_ranks]


def close_pools():
    """End all processes."""
    while _pools:
        _pools.popitem()[1].close()


class Pool:
    def __init__(self, num_ranks):
        self.num_ranks = num_ranks
        self._folder = tempfile.TemporaryDirectory()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self._stacks(rank)), daemon=True)
            with mock.patch.dict(os.environ, environment(rank, num_ranks, self._store.port)):
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers("the start of the pool", START_SECONDS)

    @property
    def is_alive(self):
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, function, *arguments, timeout=120.0):
        """The result of `function(world, *arguments)` on each rank.

        The first error of a rank is raised here, with its traceback as a note; TimeoutError after `timeout` seconds.
        """
        name = f"{function.__module__}.{function.__qualname__} on {self.num_ranks} ranks"
        call = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return self._answers(name, timeout)

    def close(self):
        """End the processes, at once where they do not end by themselves."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE_SECONDS)
        self._kill()

    def _answers(self, name, timeout):
        answers, end = {}, time.monotonic() + timeout
        while len(answers) < self.num_ranks:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            answers |= {waiting[pipe]: self._answer(waiting[pipe]) for pipe in ready}
            if not ready:
                raise self._too_long(name, timeout, sorted(waiting.values()))
            for rank, (error, _) in answers.items():
                if error is not None:
                    error.add_note(f"Rank {rank} of {name}.")
                    self._kill()
                    raise error
        return [answers[rank][1] for rank in range(self.num_ranks)]

    def _answer(self, rank):
        """(error or None, result) that a rank sent."""
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE_SECONDS)
            return RuntimeError(f"The process ended with exit code {self._processes[rank].exitcode}."), None

    def _too_long(self, name, timeout, ranks):
        """The error that says where the ranks that did not answer are; nothing runs any more."""
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR2)
        time.sleep(1.0)
        stacks = "\n".join(f"Rank {rank}:\n{self._stacks(rank).read_text()}" for rank in ranks)
        self._kill()
        return TimeoutError(f"{name} did not end within {timeout:g} s on ranks {ranks}.\n{stacks}")

    def _stacks(self, rank):
        return Path(self._folder.name) / f"stacks-{rank}.txt"

    def _kill(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        self._folder.cleanup()


def environment(rank, num_ranks, port):
    """What torchrun sets for a process on one machine, and what keeps many of them quiet on few cores."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }


def serve(pipe, stacks):
    """One rank: opens the world, then answers calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends this process
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR2, file)
        torch.set_num_threads(1)
        config = EngineConfig(name="fsdp")  # any that takes several processes: which one, the tests decide
        with World.open(config, "cpu") as world:
            pipe.send_bytes(pickle.dumps((None, None)))
            while (call := received(pipe)) is not None:
                pipe.send_bytes(answer(world, call))


def received(pipe):
    try:
        return pipe.recv_bytes()
    except EOFError:
        return None


def answer(world, call):
    """(error or None, result) of a call, pickled; each starts with torch's defaults and the same random state."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    try:
        function, arguments = pickle.loads(call)
        return pickle.dumps((None, function(world, *arguments)))
    except Exception as error:
        return pickle.dumps((sendable(error), None))


def sendable(error):
    """The error with its traceback as a note, or what it says, where it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(text)
    return error
