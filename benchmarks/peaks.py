"""The most bytes that tensors of this process take during a block, by the profiler's memory events."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# How Linux calls the threads of gloo.
GLOO_THREAD = "pt_gloo_runloop"


@contextmanager
def traced_memory() -> Iterator[profile]:
    """Notes what is allocated and freed on a CPU. What was left in cycles before would count as freed, so it goes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, FreedHere():
        yield profiler


class FreedHere(TorchDispatchMode):
    """While it is entered, what a collective held is freed by the thread that called it.

    A thread of gloo's lets go of a collective's tensors some microseconds after it has told the caller that it is done.
    If the caller has let go before, that thread frees them, and the profiler, which watches the threads that allocate,
    never hears of it: a whole weight would count as alive for ever. So the caller holds the collective until gloo's
    threads rest. (By NCCL no other thread holds tensors.)
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name.startswith("c10d::"):
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, torch.ScriptObject):
                    dist.Work.unbox(part).wait()
            while _is_gloo_running():
                time.sleep(1e-4)
        return result


def _is_gloo_running() -> bool:
    """Whether a thread of gloo's is neither asleep nor waiting for anything."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # it ended meanwhile
            name, state = (thread / "stat").read_text().partition("(")[2].rsplit(")", 1)
            if name == GLOO_THREAD and state.split()[0] == "R":
                return True
    return False


def peaks_of(profiler: profile, *blocks: str) -> list[list[int]]:
    """For each name of blocks (`torch.profiler.record_function`) the largest sum, in every one of them, of what had
    been allocated since the profile began and not yet been freed. A profile can be asked once.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    times = [event["ts"] for event in changes]
    alive = [0, *accumulate(event["args"]["Bytes"] for event in changes)]  # before each change, and after the last

    def peak(block: dict[str, Any]) -> int:
        first, last = (bisect_right(times, time) for time in (block["ts"], block["ts"] + block["dur"]))
        return max(alive[first : last + 1])

    return [[peak(event) for event in events if event.get("name") == block and "dur" in event] for block in blocks]
