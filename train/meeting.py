"""How the ranks of a run find each other, and what they tell each other beside collectives.

A launcher such as torchrun gives every rank RANK, WORLD_SIZE, LOCAL_RANK and the address of a store, MASTER_ADDR and
MASTER_PORT. Under Slurm srun is the launcher: its own variables number the tasks, and the job's script gives the
address. Through the store ranks can wait for each other however long it takes, from any thread, and say what went wrong
when collectives no longer work. A process without these variables, one in an interactive job too, is alone, with a
store of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from extract.errors import BadInput

LOOK_S = 0.02  # seconds between looks at what is waited for


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size`, number `local_rank` on its host of `local_size` (0 = not told); `launched` with others,
    or alone. `restart` counts the starts before this one; `hosts_store` tells whether others depend on this process;
    with `own_gpu` it is shown no GPU but its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 0
    launched: bool = False
    restart: int = 0
    hosts_store: bool = False
    own_gpu: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """The place that a launcher gives: torchrun's variables before Slurm's, which steps inherit."""
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls._of_torchrun(environment)
        if environment.keys() >= {"SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"}:
            return cls._of_slurm(environment)
        return cls()

    @classmethod
    def _of_torchrun(cls, environment: Mapping[str, str]) -> Place:
        rank = int(environment["RANK"])
        return cls(
            rank,
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("LOCAL_WORLD_SIZE", 0)),
            True,
            int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
            rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        )

    @classmethod
    def _of_slurm(cls, environment: Mapping[str, str]) -> Place:
        """Of a task that srun started; a job's restarts are those of its ranks."""
        rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        if size == 1:
            return cls()
        tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"])
        return cls(
            rank,
            size,
            int(environment["SLURM_LOCALID"]),
            tasks[int(environment["SLURM_NODEID"])],
            True,
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            rank == 0,
            bool(environment.get("SLURM_GPUS_PER_TASK")),
        )


ALONE = Place()


def tasks_per_node(text: str) -> list[int]:
    """Slurm's list of tasks on each node: "2(x3),1" -> [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


class Meeting:
    """What ranks tell each other through the store. Any thread may call; one that waits holds up no other."""

    def __init__(self, store: dist.Store, place: Place):
        self.store, self.place = store, place

    @classmethod
    def join(cls, place: Place, timeout_s: float) -> Meeting:
        """Find the other ranks; BadInput where they do not all come within `timeout_s`."""
        if not place.launched:
            return cls(dist.HashStore(), place)
        url = f"env://?rank={place.rank}&world_size={place.size}"
        try:
            store, _, _ = next(dist.rendezvous(url, timeout=timedelta(seconds=timeout_s)))
        except dist.DistError as error:
            raise BadInput(
                f"Rank {place.rank} did not find the other {place.size - 1} within engine.timeout_s={timeout_s:g} s "
                f"({str(error).splitlines()[0]}). Start all ranks with the same MASTER_ADDR and MASTER_PORT."
            ) from error
        return cls(dist.PrefixStore(f"crossdiff/{place.restart}", store), place)

    def another(self) -> Meeting:
        """The same, through a connection of its own."""
        return Meeting(self.store.clone(), self.place)  # type: ignore[attr-defined]  # not declared

    def tell(self, key: str, value: str) -> None:
        """Let all ranks know; to be told once for a key."""
        self.store.set(key, value)

    def has(self, key: str) -> bool:
        """Whether somebody has told `key`."""
        return bool(self.store.check([key]))

    def told(self, key: str) -> str:
        """What a rank tells under `key`; waited for, however long it takes."""
        while not self.has(key):
            time.sleep(LOOK_S)
        return self.store.get(key).decode()

    def first(self, key: str, value: str) -> bool:
        """Tell `value` if nobody has told `key` before; whether that was so. `value` is another for every rank."""
        return bool(self.store.compare_set(key, "", value).decode() == value)
