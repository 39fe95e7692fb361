"""Jobs that are requeued end or come forward: a job that starts again and again at the same place is refused.

A job of Slurm keeps its number when it is requeued, and counts its restarts. Every start leaves a line in a file beside
what it works on: how far the work was. Where nothing was added by so many starts of one job, there is something that
another start will not mend.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from extract.errors import BadInput
from extract.publish import publish


@dataclass(frozen=True)
class Start:
    """One start of a job: `restart` counts those before it; `progress` is what was done, a number that work changes."""

    restart: int
    progress: int


def note_shards(claims_folder: Path, folders: Iterable[Path], limit: int) -> None:
    """The start of a worker, which continues with as many finished shards as lie in `folders`; see `note_start`. Of
    several workers of a job the first speaks.
    """
    if "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_PROCID", "0") == "0":
        finished = sum(1 for folder in folders for _ in folder.glob("shard-*.index"))
        path = claims_folder / "restarts" / f"{os.environ.get('SLURM_JOB_ID')}.json"
        note_start(path, finished, limit, f"{finished} finished shards")


def note_start(path: Path, progress: int, limit: int, what: str, environment: Mapping[str, str] = os.environ) -> None:
    """Note in `path` that this job of Slurm starts at `progress` of `what` ("step 100 of ..."); nothing elsewhere.

    To be called by one process of a start; another call of the same start changes nothing.

    Raises:
        BadInput: more than `limit` starts of this job before this one began at `progress` too.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return
    now = Start(int(environment.get("SLURM_RESTART_COUNT") or 0), progress)
    earlier = [start for start in _read(path, job) if start.restart < now.restart]
    publish(path, json.dumps({"job": job, "starts": [asdict(start) for start in [*earlier, now]]}).encode())
    in_vain = [start for start in earlier if start.progress == progress]
    if len(in_vain) > limit:
        raise BadInput(
            f"Job {job} began {len(in_vain)} times at {what} and did not get any further, more than "
            f"max_restarts_without_progress={limit} restarts allow. Its log says how each start ended: mend that "
            f"(memory, a longer time limit, a node to exclude), then submit it again."
        )


def _read(path: Path, job: str) -> list[Start]:
    """The starts of this job so far; those of another are forgotten, as is what a full disk left."""
    try:
        content = json.loads(path.read_text())
        return [Start(**start) for start in content["starts"]] if content["job"] == job else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
