"""Which worker does which piece of work: claim files in a shared folder, without a server and without collectives.

A claim is a file that O_EXCL lets exactly one process make, on NFS too. A thread touches it while the work lasts; a
claim that nobody touched for `timeout_s`, or whose process on this host is gone, is dead and may be taken over: one
taker at a time looks once more and renames its own claim over the dead one, so there is never a moment without a claim.
Should two workers still do one piece (a process paused for longer than the timeout), both publish the same bytes
atomically, so claims save work and never decide what is right.
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

BEATS_PER_TIMEOUT = 5  # so many touches may be late before a claim looks dead
NAMELESS_S = 5.0  # a maker writes its name at once; one that did not by then died in between


@dataclass(frozen=True)
class Holder:
    """Who made a claim: host, process, Unix time; where the system has them, the boot and the namespace that the
    number of the process belongs to (containers count their own, and may share a host's name).
    """

    host: str
    pid: int
    since: float
    boot: str = ""
    namespace: int = 0

    @classmethod
    def here(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), time.time(), _boot(), _namespace())

    def is_gone(self) -> bool:
        """True if the process was one that this one can see and has ended; of all others nothing is known."""
        if (self.host, self.boot, self.namespace) != (socket.gethostname(), _boot(), _namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it runs, as another user
            pass
        return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return ""


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # no Linux
        return 0


@dataclass(frozen=True)
class Seen:
    """A claim file as another process sees it. `holder` is None while its maker has not written its name yet."""

    holder: Holder | None
    touched: float

    def is_dead(self, now: float, timeout_s: float) -> bool:
        if self.holder is None:
            return now - self.touched > min(timeout_s, NAMELESS_S)
        return now - self.touched > timeout_s or self.holder.is_gone()


def look(path: Path) -> Seen | None:
    """The claim at `path`, or None where there is none (any more)."""
    try:
        with open(path, "rb") as file:
            content, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        return Seen(Holder(**json.loads(content)), touched)
    except (ValueError, TypeError):  # its maker has not written its name yet, or a crash of the system lost it
        return Seen(None, touched)


def clock(folder: Path) -> float:
    """The time of the file system that holds `folder`: claims are touched by its clock, which need not be ours."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


class Claim:
    """One piece of work that belongs to this process. `taken_over` says that a dead worker had begun it."""

    def __init__(self, path: Path, descriptor: int, taken_over: bool):
        self.path = path
        self.taken_over = taken_over
        self._descriptor = descriptor

    def touch(self) -> None:
        """Through the open file: should somebody have taken the work over, their claim is not kept alive by us."""
        os.utime(self._descriptor)

    def is_held(self) -> bool:
        """Whether the file at `path` is still the one that this process made."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self.is_held():
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class Claims:
    """The claims that this process holds below `folder`; a context manager that keeps them alive and, at its end,
    releases what is left.
    """

    def __init__(self, folder: Path, timeout_s: float):
        self.folder = folder
        self.timeout_s = timeout_s
        self._clock = (-math.inf, 0.0)  # our time of the last reading, and what it was
        self._held: set[Claim] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for claim in list(self._held):
            self.release(claim)

    def take(self, name: str) -> Claim | None:
        """The claim `<folder>/<name>.claim`, or None while a living worker holds it."""
        path = self.folder / f"{name}.claim"
        path.parent.mkdir(parents=True, exist_ok=True)
        claim = _make(path) or self._take_over(path)
        if claim is not None:
            with self._lock:
                self._held.add(claim)
        return claim

    def clear(self, name: str) -> None:
        """Remove the claims that dead workers left below `<folder>/<name>`, whose work is done."""
        for path in (self.folder / name).glob("*.claim"):
            claim = self._take_over(path)
            if claim is not None:
                claim.release()

    def others_at_work(self, name: str) -> bool:
        """Whether a living worker holds a claim below `<folder>/<name>`."""
        paths = (self.folder / name).glob("*.claim")
        return any((seen := look(path)) and not seen.is_dead(self._now(path), self.timeout_s) for path in paths)

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._held.discard(claim)
            claim.release()

    def _take_over(self, path: Path) -> Claim | None:
        return _take_over(path, self._now(path), self.timeout_s)

    def _now(self, path: Path) -> float:
        """The file system's time, at most one beat old: reading it makes a file, and a pass meets thousands of claims.
        A late clock makes claims look younger, never dead.
        """
        read, now = self._clock
        if time.monotonic() - read > self.timeout_s / BEATS_PER_TIMEOUT:
            read, now = time.monotonic(), clock(path.parent)
            self._clock = read, now
        return now

    def _beat(self) -> None:
        while not self._ended.wait(self.timeout_s / BEATS_PER_TIMEOUT):
            with self._lock:
                for claim in self._held:
                    try:
                        claim.touch()
                    except OSError:  # the server is away or the file is gone: the claim ages, and that is all it should
                        continue


def _make(path: Path) -> Claim | None:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    _sign(descriptor)
    return Claim(path, descriptor, taken_over=False)


def _sign(descriptor: int) -> None:
    os.write(descriptor, json.dumps(asdict(Holder.here())).encode())
    os.fsync(descriptor)  # network file systems show others what is synced or closed; this file stays open


def _take_over(path: Path, now: float, timeout_s: float) -> Claim | None:
    """Replace the claim at `path` if it is dead; None if it is not, or if another process is just doing so."""
    seen = look(path)
    if seen is None or not seen.is_dead(now, timeout_s):
        return None
    with _only_taker(path, now) as alone:
        seen = look(path) if alone else None  # whoever took over before us is alive
        if seen is None or not seen.is_dead(now, timeout_s):
            return None
        own = path.with_name(f"{path.name}.own")
        descriptor = os.open(own, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        _sign(descriptor)
        own.replace(path)
        return Claim(path, descriptor, taken_over=True)


@contextmanager
def _only_taker(path: Path, now: float) -> Iterator[bool]:
    """Whether this process alone may replace the claim at `path`. What a taker left that died is removed."""
    lock = path.with_name(f"{path.name}.taker")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        other = look(lock)
        if other is not None and now - other.touched > NAMELESS_S:
            lock.unlink(missing_ok=True)
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)


def in_turn(pieces: Sequence[int], environment: Mapping[str, str]) -> list[int]:
    """`pieces` in the order in which this worker tries them: worker w of W begins w/W of the way through.

    Workers then seldom meet. torchrun, srun and array tasks say which worker this is; one started by hand begins at
    the first piece and passes over what others hold.
    """
    start = int(_position(environment) * len(pieces))
    return [*pieces[start:], *pieces[:start]]


def _position(environment: Mapping[str, str]) -> float:
    """w/W in [0, 1); array tasks come first, the processes within one divide its part."""

    def number(name: str, default: int) -> int:
        return int(environment.get(name) or default)

    if "RANK" in environment:
        within = number("RANK", 0) / max(1, number("WORLD_SIZE", 1))
    else:
        within = number("SLURM_PROCID", 0) / max(1, number("SLURM_NTASKS", 1))
    tasks = max(1, number("SLURM_ARRAY_TASK_COUNT", 1))
    first, step = number("SLURM_ARRAY_TASK_MIN", 0), max(1, number("SLURM_ARRAY_TASK_STEP", 1))
    task = (number("SLURM_ARRAY_TASK_ID", first) - first) // step
    return ((task + within) / tasks) % 1.0
