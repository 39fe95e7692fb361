"""Two ways of doing one thing, timed in turn in one process, so that a drift of the machine's speed hits both alike."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def ratio(slow: Callable[[], object], fast: Callable[[], object], repeats: int = 7) -> tuple[float, float, float]:
    """(median seconds of `slow`, median seconds of `fast`, median of the ratios pair by pair), after one warm-up
    each.
    """
    slow(), fast()
    pairs = [(_seconds(slow), _seconds(fast)) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine() -> str:
    """What a line of LOG.md must say: commit, hardware, threads, torch."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"commit {commit}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
