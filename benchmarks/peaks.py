"""The most bytes that tensors of this process take during a block, by the profiler's memory events."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced_memory() -> Iterator[profile]:
    """Notes what is allocated and freed on a CPU. What was left in cycles before would count as freed, so it goes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield profiler


def peaks_of(profiler: profile, *blocks: str) -> list[list[int]]:
    """For each name of blocks (`torch.profiler.record_function`) the largest sum, in every one of them, of what had
    been allocated since the profile began and not yet been freed. A profile can be asked once.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = accumulate(event["args"]["Bytes"] for event in changes)
    alive = [(event["ts"], total) for event, total in zip(changes, totals, strict=True)]
    return [
        [
            max(total for time, total in alive if event["ts"] <= time <= event["ts"] + event["dur"])
            for event in events
            if event.get("name") == block and "dur" in event
        ]
        for block in blocks
    ]
