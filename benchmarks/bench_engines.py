"""The engines on 2 and 4 processes against one process: time, memory and bytes of a step, time to save and to resume.

python -m benchmarks.bench_engines

All engines live in the same processes, one thread each, joined by gloo, and take their steps in turn; that of one
process has the whole batch, while the other processes wait. Reported for each:

    step      median milliseconds, and the median of its ratios to the step of one process beside it
    peak      MiB that a rank has allocated at most: until its first weights are drawn, in two steps, and as planned
    sent      MB that a rank sends in a step: through its sockets, as its collectives would send them in a ring, and by
              the formulas of `train.step_time`. gloo's reduce-scatter is an all-reduce, which sends twice as much.
    save      seconds until a step may follow, and until the checkpoint is on disk; seconds to resume from it

Where there is a GPU, one process without process groups, fsdp and deepspeed with one rank follow at the headline size,
each in a process of its own: tokens a second and the peak of memory, so what the wrapper costs.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import record_function

from benchmarks.peaks import peaks_of, traced_memory
from benchmarks.timing import machine
from benchmarks.traffic import RingTraffic, sent_by_sockets
from train.checkpoint import Checkpoints
from train.config import CrosscoderConfig, EngineConfig, TrainingConfig, TrainSettings
from train.engine import Engine
from train.job import Job, Layout
from train.memory import peak_memory
from train.step_time import sent_bytes
from train.world import World

REPEATS = 7
MODELS = ["base", "tuned"]
SMALL = Job(num_tokens=1024, num_models=2, d_model=256, num_latents=8192, k=32, stored_token_bytes=2 * 2 * 256)
HEADLINE = Job(4096, 2, 3584, 114688, 100, precision="bf16", stored_token_bytes=2 * 2 * 3584)
SINGLE = Layout("single")


def layouts(num_ranks: int) -> list[Layout]:
    stages = [Layout("deepspeed", num_ranks, stage) for stage in (1, 2, 3)]
    return [SINGLE, Layout("fsdp", num_ranks), *stages, Layout("latent", num_ranks)]


@dataclass
class Measured:
    """What one rank found for one engine: seconds of each step, bytes, seconds to save and to resume."""

    start: int
    peak: int
    seconds: list[float] = field(default_factory=list)
    sockets: float = 0.0
    ring: float = 0.0
    copied: float = 0.0
    on_disk: float = 0.0
    resumed: float = 0.0


class Subject:
    """An engine with its weights drawn, and this rank's part of a batch of noise."""

    def __init__(self, job: Job, layout: Layout, world: World):
        self.world = World.alone(world.device) if layout == SINGLE else world
        settings = settings_of(job, layout, world.device)
        scaling = torch.zeros(job.num_models, job.d_model), torch.ones(job.num_models)
        self.engine = Engine(settings, MODELS, job.d_model, *scaling, self.world)
        random, group = torch.Generator().manual_seed(0), self.world.everyone
        x_BMD = torch.randn(job.num_tokens, job.num_models, job.d_model, generator=random).bfloat16()
        self._x_bMD = x_BMD[group.rank :: group.size].to(world.device)
        self._token_b = torch.arange(group.rank, job.num_tokens, group.size) if group.size > 1 else None
        self.engine.initialise(self._x_bMD, self._token_b)

    def step(self) -> None:
        self.engine.step(self._x_bMD, measured=False, token_b=self._token_b)


def settings_of(job: Job, layout: Layout, device: torch.device) -> TrainSettings:
    return TrainSettings(
        pairs={"pair": MODELS},
        hookpoint="block20",
        crosscoder=CrosscoderConfig(num_latents=job.num_latents, k=job.k),
        training=TrainingConfig(num_tokens_per_step=job.num_tokens, precision=job.precision, device=str(device)),
        engine=EngineConfig(name=layout.engine, zero_stage=layout.zero_stage or EngineConfig.zero_stage),
    )


def main() -> None:
    print(machine())
    for num_ranks in (2, 4):
        print(f"{num_ranks} processes, B={SMALL.num_tokens} M*D={SMALL.width} L={SMALL.num_latents} k={SMALL.k}")
        found = in_processes(num_ranks, layouts(num_ranks))
        print(*table(found, layouts(num_ranks)), sep="\n")
    if torch.cuda.is_available():
        for layout in (SINGLE, Layout("fsdp"), Layout("deepspeed", zero_stage=2)):
            in_processes(1, [layout])


def in_processes(num_ranks: int, compared: list[Layout]) -> list[dict[str, Measured]]:
    """What each rank found, by label of the engine."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, (num_ranks, store.port, compared, folder), nprocs=num_ranks)
        files = [Path(folder) / f"{rank}.json" for rank in range(num_ranks)]
        texts = [file.read_text() for file in files if file.exists()]
    return [{label: Measured(**values) for label, values in json.loads(text).items()} for text in texts]


def one_rank(rank: int, num_ranks: int, port: int, compared: list[Layout], folder: str) -> None:
    """A process as torchrun starts it: measures, and leaves what it found in a file."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {name: str(value) for name, value in {**ranks, **rendezvous, "TORCHELASTIC_RESTART_COUNT": 0}.items()}
    logging.disable(logging.WARNING)
    device = "auto" if num_ranks == 1 else "cpu"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    with World.open(EngineConfig(name=compared[-1].engine), device) as world:
        if num_ranks == 1:
            headline(compared[0], world)
        else:
            found = measured(world, compared, Path(folder))
            values = {label: asdict(part) for label, part in found.items()}
            (Path(folder) / f"{rank}.json").write_text(json.dumps(values))


def measured(world: World, compared: list[Layout], folder: Path) -> dict[str, Measured]:
    """What this rank found, by label; of `single` on rank 0 alone."""
    mine = [layout for layout in compared if layout != SINGLE or world.is_main]
    found: dict[str, Measured] = {}
    for layout in in_turn(compared, mine):
        found[layout.label] = Measured(*peak_bytes(layout, world))
    subjects = {layout: Subject(SMALL, layout, world) for layout in mine}
    for repeat in range(REPEATS + 1):
        for layout in in_turn(compared, mine):
            seconds = seconds_of(subjects[layout].step)
            found[layout.label].seconds += [seconds] if repeat > 0 else []
    for layout in in_turn(compared, mine):
        measure_traffic(subjects[layout], found[layout.label])
        save_and_resume(subjects[layout], folder / layout.label, found[layout.label])
    return found


def in_turn(compared: list[Layout], mine: list[Layout]) -> Iterator[Layout]:
    """Those of this rank, each begun by all ranks together."""
    for layout in compared:
        dist.barrier()
        if layout in mine:
            yield layout


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_traffic(subject: Subject, found: Measured, num_steps: int = 3) -> None:
    before = sent_by_sockets()
    with RingTraffic() as ring:
        for _ in range(num_steps):
            subject.step()
    found.sockets, found.ring = (sent_by_sockets() - before) / num_steps, sum(ring.sent.values()) / num_steps


def save_and_resume(subject: Subject, folder: Path, found: Measured) -> None:
    checkpoints = Checkpoints(folder, 1, {}, subject.world)
    found.copied = seconds_of(lambda: checkpoints.save(subject.engine.state()))
    found.on_disk = found.copied + seconds_of(checkpoints.wait)
    found.resumed = seconds_of(partial(resume, subject, checkpoints))
    checkpoints.close()


def resume(subject: Subject, checkpoints: Checkpoints) -> None:
    saved = checkpoints.load()
    assert saved is not None
    subject.engine.load_state(saved)


def peak_bytes(layout: Layout, world: World) -> tuple[int, int]:
    """The most bytes of tensors until an engine's first weights are drawn, and in two steps."""
    with traced_memory() as profiler:
        with record_function("start"):
            subject = Subject(SMALL, layout, world)
        with record_function("steps"):
            subject.step()
            subject.step()
    (start,), (steps,) = peaks_of(profiler, "start", "steps")
    return start, steps


def table(found: list[dict[str, Measured]], compared: list[Layout]) -> Iterator[str]:
    """A line for each engine: the slowest or largest of the ranks."""
    yield f"{'':10} {'step':>14} {'peak MiB':>22} {'sent MB in a step':>26} {'seconds to':>26}"
    heads = ("ms", "x one", "start", "steps", "planned", "sockets", "ring", "formula", "copy", "save", "resume")
    yield f"{'engine':10} " + " ".join(f"{head:>{7 if i < 5 else 8}}" for i, head in enumerate(heads))
    single = found[0][SINGLE.label].seconds
    for layout in compared:
        ranks = [rank[layout.label] for rank in found if layout.label in rank]
        seconds = [max(each) for each in zip(*(rank.seconds for rank in ranks), strict=True)]
        ratio = statistics.median(a / b for a, b in zip(seconds, single, strict=True))
        start, peak = max(rank.start for rank in ranks), max(rank.peak for rank in ranks)
        memory = [start, peak, sum(peak_memory(SMALL, layout, "cpu").values())]
        sent = [max(rank.sockets for rank in ranks), max(rank.ring for rank in ranks), sent_bytes(SMALL, layout)]
        saving = [max(getattr(rank, name) for rank in ranks) for name in ("copied", "on_disk", "resumed")]
        yield (
            f"{layout.label:10} {1e3 * statistics.median(seconds):7.0f} {ratio:7.2f} "
            + " ".join(f"{value / 2**20:7.0f}" for value in memory)
            + " "
            + " ".join([*(f"{value / 1e6:8.1f}" for value in sent), *(f"{value:8.2f}" for value in saving)])
        )


def headline(layout: Layout, world: World) -> None:
    """One rank on a GPU, at full size: tokens a second, and the peak of memory."""
    subject = Subject(HEADLINE, layout, world)
    busy(subject, 3)
    seconds = seconds_of(partial(busy, subject, 10)) / 10
    print(
        f"headline: {layout.label} with one rank: {HEADLINE.num_tokens / seconds:,.0f} tokens/s, "
        f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )


def busy(subject: Subject, num_steps: int) -> None:
    """Steps that the host does not wait for one by one."""
    for _ in range(num_steps):
        subject.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
