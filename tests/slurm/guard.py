"""Ends every process of a private Slurm, whoever started it and wherever it went.

python tests/slurm/guard.py FOLDER      until standard input ends, then kill all that have SLURM_CONF=FOLDER/slurm.conf
                                        in their environment, and delete the folder

The test that owns the cluster holds the other end of standard input. So the cluster also ends when the test is killed,
and there is one way down. FOLDER belongs to this cluster alone: nothing else on the machine carries it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOOK_S = 0.05


def marked(mark: bytes) -> Iterator[int]:
    """The processes, zombies apart, that were started with `mark` in their environment."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def end_all(mark: bytes) -> None:
    """Kill them, and what they started before they died, until none is left."""
    while processes := list(marked(mark)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(LOOK_S)


if __name__ == "__main__":
    sys.stdin.read()
    folder = Path(sys.argv[1])
    end_all(f"SLURM_CONF={folder / 'slurm.conf'}".encode())
    shutil.rmtree(folder)
