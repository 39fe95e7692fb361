"""Reading for n members of a sweep: one shared reader against a loader in each, on one store in memory.

python -m benchmarks.bench_shared_reader [folder=/dev/shm] [gigabytes=1] [members=2,4]

Members are processes that take the same batches (B, M, D), shuffled as in training, and add up their values, the least
that a step does with them; `sums` are members that add up one batch again and again, and read nothing. `alone`: each
member has a loader of its own. `shared`: one more process reads, and members see its batches where they lie. CPU
seconds are those of all processes, wall seconds those until the last has ended; the two ways are timed in turn.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import torch

from benchmarks.bench_loader import BATCH, DOCUMENT_TOKENS, MODELS, WIDTHS, settings_of, write_store
from benchmarks.timing import machine
from train.data import ActivationPairs
from train.loader import Loader, Source
from train.reader import Members, serve
from train.ring import Channel, joined
from train.stream import BatchStream

EPOCHS, REPEATS = 2, 3
FORK = get_context("fork")


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=") for argument in arguments)
    torch.set_num_threads(1)
    print(f"{machine()}, {len(os.sched_getaffinity(0))} cores")
    for d_model in WIDTHS:
        with tempfile.TemporaryDirectory(dir=given.get("folder", "/dev/shm")) as folder:
            num_bytes = int(1e9 * float(given.get("gigabytes", "1")))
            compare(Path(folder), d_model, num_bytes, [int(each) for each in given.get("members", "2,4").split(",")])


def compare(folder: Path, d_model: int, num_bytes: int, numbers: list[int]) -> None:
    """A store of about `num_bytes`, read for each number of members."""
    row_bytes = 2 * d_model * len(MODELS)
    write_store(folder, d_model, num_bytes // (row_bytes * DOCUMENT_TOKENS))
    settings = settings_of(folder)
    stream = BatchStream(ActivationPairs.open(settings), 0, BATCH, settings.data)
    num_steps = EPOCHS * stream.steps_per_epoch
    print(f"\nD = {d_model} x {len(MODELS)}: {num_steps} steps of {BATCH * row_bytes / 1e6:.1f} MB")
    for number in numbers:
        rounds = [[timed(way, stream, num_steps, number) for way in (alone, shared, sums)] for _ in range(REPEATS)]
        show(number, rounds)


def show(number: int, rounds: list[list[tuple[float, float]]]) -> None:
    """Medians of (CPU, wall) seconds of each way, and of the ratios round by round."""
    for what, index in (("CPU", 0), ("wall", 1)):
        own, fed, least = (median(each[way][index] for each in rounds) for way in range(3))
        ratio = median(each[0][index] / each[1][index] for each in rounds)
        print(f"  {number} members, {what} s: alone {own:.2f}, shared {fed:.2f}, sums {least:.2f}: {ratio:.2f} times")
    reading = median((each[0][0] - each[2][0]) / (each[1][0] - each[2][0]) for each in rounds)
    print(f"  {number} members, CPU s less the sums: {reading:.2f} times")


def timed(
    way: Callable[[BatchStream, int, int], list[BaseProcess]], stream: BatchStream, num_steps: int, number: int
) -> tuple[float, float]:
    """(CPU, wall) seconds of the processes that a way starts."""
    before, began = children_seconds(), time.perf_counter()
    for process in way(stream, num_steps, number):
        process.join()
        assert process.exitcode == 0
    return children_seconds() - before, time.perf_counter() - began


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def started(targets: list[Callable[[], None]]) -> list[BaseProcess]:
    processes: list[BaseProcess] = [FORK.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    return processes


def alone(stream: BatchStream, num_steps: int, number: int) -> list[BaseProcess]:
    return started([partial(take, stream, num_steps)] * number)


def shared(stream: BatchStream, num_steps: int, number: int) -> list[BaseProcess]:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(number)]
    owns, ends = zip(*pairs, strict=True)
    members = (partial(be_fed, stream, num_steps, member, owns, ends) for member in range(number))
    processes = started([partial(read, stream, owns, ends), *members])
    for end in (*owns, *ends):
        end.close()
    return processes


def sums(stream: BatchStream, num_steps: int, number: int) -> list[BaseProcess]:
    return started([partial(add_up, stream.batch(0), num_steps)] * number)


def read(stream: BatchStream, owns: tuple[socket.socket, ...], ends: tuple[socket.socket, ...]) -> None:
    """The reader; what a fork hands to each process but is another's is closed there."""
    for end in ends:
        end.close()
    lifeline, _held = os.pipe()
    serve(Members(owns, lifeline), lambda: stream, 1)


def be_fed(
    stream: BatchStream, num_steps: int, member: int, owns: tuple[socket.socket, ...], ends: tuple[socket.socket, ...]
) -> None:
    for number, (own, end) in enumerate(zip(owns, ends, strict=True)):
        own.close()
        if number != member:
            end.close()
    take(stream, num_steps, joined(Channel(ends[member]), stream, 0, num_steps, lambda: False))


def take(stream: BatchStream, num_steps: int, source: Source | None = None) -> None:
    with Loader(stream, 0, num_steps, torch.device("cpu"), 1, source=source) as loader:
        for batch in loader:
            batch.x_BMD.view(torch.int16).sum()


def add_up(x_BMD: torch.Tensor, num_steps: int) -> None:
    for _ in range(num_steps):
        x_BMD.view(torch.int16).sum()


if __name__ == "__main__":
    main(sys.argv[1:])
