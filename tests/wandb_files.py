"""What W&B wrote to disk for a run, read back with W&B's own reader."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from train.metric_table import METRICS


@dataclass
class WandbFile:
    """One process's part of a run. `history` are its rows, with names such as "a.bins" for parts of values."""

    run_id: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    preempting: bool = False
    exit_code: int | None = None


def offline_parts(folder: Path) -> list[WandbFile]:
    """All parts in <folder>/wandb, oldest first."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> WandbFile:
    package = importlib.util.find_spec("wandb")
    assert package is not None and package.origin is not None
    core = Path(package.origin).parent / "bin" / "wandb-core"  # what `wandb leet` runs, after seconds of imports
    command = [core, "leet", "inspect", "--json", "--no-observability", "--run-file", path, path.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = WandbFile()
    for record in map(json.loads, done.stdout.splitlines()):
        kind = record["type"]
        if kind == "run":
            found.run = record["run"]
            found.run_id, found.config = found.run["run_id"], found.run["config"]["update"]
        elif kind == "history":
            found.history.append(record["history"]["item"])
        elif kind == "artifact":
            found.artifacts.append(record["artifact"])
        elif kind == "preempting":
            found.preempting = True
        elif kind == "exit":
            found.exit_code = record["exit"].get("exit_code", 0)
    return found


def promised(when: str, row: dict[str, Any]) -> bool:
    """Whether a row has every metric of the table that training promises without conditions, and in W&B's names."""
    names = {name.removesuffix(".values") for name in row}
    wanted = [m for m in METRICS if m.section in ("train", "val", "speed", "memory") and not m.conditional]
    return all(any(metric.matches(name) for name in names) for metric in wanted if metric.when == when)


def isolate(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let W&B find nothing of this machine: no login, no settings, no mode."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
