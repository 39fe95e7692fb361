"""Members of a sweep on one machine, all at a time, with one process that reads for those that have the same data.

    statuses = run_members(members, signals)

Members that have the same store, pair, hookpoint, seed, kept tokens, order of tokens and num_tokens_per_step get the
same batches in the same order, whatever k, lr or num_latents: a reader (`train.reader`) reads them once and leaves them
in memory that all see (`train.ring`), bit for bit what each would read. Held-out tokens and the batch that the weights
begin with each member reads for itself. Members take their steps together, up to a few: the slowest sets the pace.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.config import TrainSettings
from train.ring import READER
from train.runs import result_settings, selected_pair
from train.stops import starting_deaf
from train.sweep import Member, status_text

if TYPE_CHECKING:
    from train.sweep_local import PassedOn

log = logging.getLogger(__name__)
LOG_FILE = "log.txt"  # in a member's run folder: what it says
# What tells a process that others were launched with it, as of these processes each is alone.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
END_S = 30.0  # seconds in which a reader ends whose members have all left


def run_members(members: Sequence[Member], signals: PassedOn) -> list[int | None]:
    """Train members that are runs of one process, each as its own `command`; their statuses in order, as `subprocess`
    has them. On GPUs as many at a time as there are, one on each; elsewhere all at a time; with an equal part of the
    cores. None for those that were not started, because `signals` asked to stop before.

    A member's output is appended to LOG_FILE in its run folder; this process says what it runs, and how each ended when
    it does, and writes it down. A member that fails, ends or is killed leaves the others as they are. If the reader is,
    its members save and end with EXIT_HANG.
    """
    gpus, statuses = visible_gpus(), dict[int, int]()
    for wave in _waves(members, len(gpus) or len(members)):
        if signals.requested:
            break
        found = _run([members[number] for number in wave], gpus, signals)
        statuses |= dict(zip(wave, found, strict=True))
    return [statuses.get(number) for number in range(len(members))]


def data_key(settings: TrainSettings) -> str:
    """Equal for members whose batches are equal, and for no others."""
    places = [settings.place(member) for member in settings.pairs[selected_pair(settings)]]
    stores = [settings.activations_folder(place.model, place.hookpoint) for place in places]
    order = {
        name: value
        for name, value in result_settings(settings).items()
        if name in ("seed", "training.num_tokens_per_step") or name.startswith(("kept.", "data."))
    }
    return json.dumps([str(settings.tokens_folder), *map(str, stores), order])


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    number, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:number] if named else [str(gpu) for gpu in range(number)]


def _waves(members: Sequence[Member], at_once: int) -> Iterator[list[int]]:
    """Numbers of the members that run at a time, those of the same data side by side."""
    keys = [data_key(member.settings) for member in members]
    order = sorted(range(len(members)), key=lambda number: keys.index(keys[number]))
    for start in range(0, len(order), at_once):
        yield order[start : start + at_once]


def _run(members: list[Member], gpus: list[str], signals: PassedOn) -> list[int]:
    """The statuses of members that run at a time."""
    with ExitStack() as opened:
        ends = [
            end
            for _, group in groupby(members, lambda member: data_key(member.settings))
            for end in _ends(list(group), opened)
        ]
        processes = []
        for number, (member, end) in enumerate(zip(members, ends, strict=True)):
            own = part_of_cores(len(members)) | (_gpu_of(member, gpus[number]) if gpus else {})
            processes.append(_start(member, end, own))
            opened.callback(processes[-1].terminate)  # where the next one cannot be started; else it has ended
        return signals.wait(processes, lambda number, status: _ended(members[number], status))


def _ended(member: Member, status: int) -> None:
    member.ended = status_text(status)
    member.record()
    log.info("%s: %s; %s", member.name, member.ended, last_line(member.folder / LOG_FILE))


def _gpu_of(member: Member, gpu: str) -> dict[str, str]:
    """The only GPU that a member sees, unless its settings name one."""
    return {"CUDA_VISIBLE_DEVICES": gpu} if member.settings.training.device in ("auto", "cuda") else {}


def part_of_cores(num_members: int) -> dict[str, str]:
    """The threads of one of several processes: an equal part of those that this process would have, which are the cores
    or, where the environment says OMP_NUM_THREADS, so many.
    """
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_members))}


def _ends(members: list[Member], opened: ExitStack) -> list[socket.socket | None]:
    """The members' ends of sockets to a reader that is started for them; None for those that read for themselves."""
    reason = _alone(members)
    if reason:
        for member in members:
            log.info("%s reads the store for itself: %s", member.name, reason)
        return [None] * len(members)
    log.info("One process reads the store for %d members", len(members))
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in members]
    opened.enter_context(_reader(members[0].overrides, [own for own, _ in pairs]))
    return [end for _, end in pairs]


def _alone(members: list[Member]) -> str:
    """Why members of the same data cannot share a reader; "" where they can."""
    if members[0].settings.data.mode == "online":
        return "with data=online there is no store to read"
    if not hasattr(os, "memfd_create"):
        return "sharing needs Linux"
    return "" if len(members) > 1 else "no other that runs now has the same data settings"


@contextmanager
def _reader(overrides: list[str], ends: list[socket.socket]) -> Iterator[None]:
    """A reader at its ends of sockets, which it ends by itself; killed if it does not."""
    descriptors = [end.fileno() for end in ends]
    command = [sys.executable, "-m", "train.reader", ",".join(map(str, descriptors)), *overrides]
    with starting_deaf():  # srun passes signals to all processes of a job
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            env={**_environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # a terminal's Ctrl-C is for the members
        )
    for end in ends:
        end.close()
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(member: Member, end: socket.socket | None, own: dict[str, str]) -> subprocess.Popen[bytes]:
    """A member's process. Its end of a socket is closed here: the reader is to know when the process is gone."""
    member.folder.mkdir(parents=True, exist_ok=True)
    descriptors = [] if end is None else [end.fileno()]
    told = {} if end is None else {READER: str(end.fileno())}
    member.log_file = member.log_file or str(member.folder / LOG_FILE)
    with open(member.folder / LOG_FILE, "ab") as file, starting_deaf():
        process = subprocess.Popen(
            member.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            env={**_environment(), **own, **told},
        )
    if end is not None:
        end.close()
    log.info("%s runs as process %d and writes %s", member.name, process.pid, member.folder / LOG_FILE)
    return process


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "it said nothing")
