"""The engines that a machine can run a job with, compared; which one to choose, and what to know before starting."""

from __future__ import annotations

from dataclasses import dataclass

from train.gpus import Gpu
from train.job import FLOAT, Job, Layout, layouts
from train.memory import largest
from train.run_memory import host_memory, run_memory
from train.step_time import PRODUCTS, Machine, StepTime, sent_bytes, step_time

GIB = 2**30
# Left free on a GPU: context, libraries' workspaces and buffers of collectives, and a share for fragmentation.
RESERVED_GIB, RESERVED_SHARE = 1.5, 0.05
# Of two engines that differ by less, the simpler is chosen.
NOTABLY_FASTER = 1.1


@dataclass(frozen=True)
class StoreFacts:
    """What the run reads. `num_tokens` and `disk_bytes` are None where neither a store nor the settings tell."""

    d_model: int
    codec: str
    # Bytes that a token of all models is read with.
    token_bytes: int
    num_tokens: int | None
    disk_bytes: int | None
    # Whether the models compute activations while training, so that only tokens are read.
    online: bool = False


@dataclass(frozen=True)
class Option:
    """One engine on the machine."""

    layout: Layout
    # Bytes of what is alive on a GPU at the largest moment of each part of a run, by name.
    parts: dict[str, dict[str, float]]
    time: StepTime
    # Whether it fits into a GPU.
    fits: bool
    # Bytes that the rank of a GPU takes on the host, besides batches.
    host: float = 0

    @property
    def memory(self) -> dict[str, float]:
        """Bytes at the largest moment of the run, by name."""
        return largest(list(self.parts.values()))

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """A job on a machine."""

    title: str
    job: Job
    machine: Machine
    store: StoreFacts
    options: list[Option]
    num_steps: int
    keep_checkpoints: int
    # Whether language models are kept beside training (training.recovered_tokens).
    has_recovered: bool = False

    def hours(self, option: Option) -> float:
        """Of all steps; without validation, checkpoints and start."""
        return self.num_steps * option.time.step / 3600

    @property
    def disk(self) -> dict[str, float]:
        """Bytes by what they hold. One checkpoint more than are kept is on disk while the newest is written."""
        store, parameters = self.store, FLOAT * self.job.num_parameters
        num_tokens = store.num_tokens or self.num_steps * self.job.num_tokens
        norms = FLOAT * self.job.num_models * num_tokens
        activations = 0 if store.online else store.disk_bytes or num_tokens * store.token_bytes + norms
        return {
            "activations": activations,
            "tokens": FLOAT * num_tokens,
            "checkpoints": 3 * parameters * (self.keep_checkpoints + 1),
            "crosscoder": parameters,
        }


def plan_options(job: Job, machine: Machine, layouts: list[Layout]) -> list[Option]:
    """Every layout with its memory and time."""
    return [_option(job, machine, layout) for layout in layouts]


def _option(job: Job, machine: Machine, layout: Layout) -> Option:
    parts = run_memory(job, layout)
    fits = _peak(job, layout) <= usable_bytes(machine.gpu)
    return Option(layout, parts, step_time(job, layout, machine), fits, host_memory(job, layout))


def _peak(job: Job, layout: Layout) -> float:
    return sum(largest(list(run_memory(job, layout).values())).values())


def usable_bytes(gpu: Gpu) -> float:
    """Memory of a GPU that a step may fill."""
    return (gpu.memory_gib * (1 - RESERVED_SHARE) - RESERVED_GIB) * GIB


def fastest(options: list[Option]) -> Option | None:
    """The fastest that fits; of those about as fast the first, for simpler engines come first."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    shortest = min(option.time.step for option in fitting)
    return next(option for option in fitting if option.time.step <= NOTABLY_FASTER * shortest)


def choice(plan: Plan) -> str:
    """Which engine to run, and why; what would be needed where none fits."""
    best = fastest(plan.options)
    if best is None:
        return f"none: no engine fits into {plan.machine.gpu.memory_gib:g} GiB. {_more_gpus(plan)}"
    used, there = best.layout.num_ranks, plan.machine.num_gpus
    gpus = f"{used} of {there} GPUs" if used < there else f"{there} GPU" + "s" * (there > 1)
    return f"{best.layout.setting} on {gpus}: {duration(plan.hours(best))}, bound by {best.time.bound_by}."


def _more_gpus(plan: Plan) -> str:
    """With how many GPUs of the kind, up to 64, some engine would fit."""
    usable = usable_bytes(plan.machine.gpu)
    for num_gpus in (2, 4, 8, 16, 32, 64):
        for layout in layouts(num_gpus) if num_gpus > plan.machine.num_gpus else []:
            peak = _peak(plan.job, layout)
            if peak <= usable:
                return f"On {num_gpus} of these GPUs {layout.setting} would ({peak / GIB:.1f} GiB on each)."
    return "Nor would another, on up to 64 of these GPUs: lower crosscoder.num_latents or take a larger GPU."


def duration(hours: float) -> str:
    """ "1.5 h", "12 min", "40 s"."""
    for unit, size in (("h", 1.0), ("min", 60.0)):
        if hours * size >= 1:
            return f"{hours * size:.1f} {unit}"
    return f"{hours * 3600:.0f} s"


def warnings(plan: Plan) -> list[str]:
    """What to know before starting, most pressing first."""
    about = fastest(plan.options)
    found = [*_memory_warnings(plan), *_precision_warnings(plan), *_reading_warnings(plan)]
    found += [] if about is None else _batch_warnings(plan, about)
    return [*found, *_communication_warnings(plan), *_epoch_warnings(plan), *_model_warnings(plan)]


def _memory_warnings(plan: Plan) -> list[str]:
    usable = usable_bytes(plan.machine.gpu) / GIB
    crowded = [f"{option.layout.label} {option.peak / GIB:.1f}" for option in plan.options if not option.fits]
    if not crowded:
        return []
    return [
        f"Does not fit: of {plan.machine.gpu.memory_gib:g} GiB a step may fill {usable:.1f}; needed are "
        f"{', '.join(crowded)}."
    ]


def _precision_warnings(plan: Plan) -> list[str]:
    gpu, precision = plan.machine.gpu, plan.job.precision
    if precision == "bf16" or gpu.bf16_tflops < 2 * gpu.fp32_tflops:
        return []
    times = gpu.bf16_tflops / gpu.fp32_tflops
    return [f"training.precision=fp32: the products of {gpu.name} are {times:.0f} times faster in bf16."]


def _reading_warnings(plan: Plan) -> list[str]:
    bound = [option for option in plan.options if option.time.read > option.time.work]
    if not bound:
        return []
    read, rate = bound[0].time.read, plan.machine.read_gbps
    needed = ", ".join(f"{o.layout.label} read_gbps={rate * read / o.time.work:.2g}" for o in bound)
    return [
        f"I/O-bound: at read_gbps={rate:g} a step's tokens take {1e3 * read:.3g} ms, longer than the step itself. "
        f"So as not to wait: {needed}. activations.codec=fp8 or int8 halves what bf16 reads."
    ]


def _batch_warnings(plan: Plan, option: Option) -> list[str]:
    adam = option.time.parts["Adam"]
    product = sum(option.time.parts.get(name, 0) for name in PRODUCTS)
    if adam <= product:
        return []
    balanced = round(plan.job.num_tokens * adam / product, -2)
    return [
        f"Small batch: Adam's pass over the weights ({1e3 * adam:.3g} ms) outlasts the dense products "
        f"({1e3 * product:.3g} ms). A token costs less in batches up to about {balanced:,.0f}, with fewer and "
        "larger steps."
    ]


def _communication_warnings(plan: Plan) -> list[str]:
    """The latent engine sends what grows with the tokens, the others what grows with the weights."""
    if plan.machine.num_gpus == 1:
        return []
    undivided = [layout for layout in (option.layout for option in plan.options) if layout.num_copies == 1]
    sent = {layout.label: sent_bytes(plan.job, layout) for layout in undivided if layout.engine != "single"}
    latent = sent.pop("latent")
    label = min(sent, key=lambda label: (sent[label], label))
    if latent <= sent[label]:
        return []
    crossing = plan.job.num_tokens * sent[label] / latent
    return [
        f"Large batch: beyond {crossing:,.0f} tokens a step the latent engine sends more than {label}; divide the "
        "tokens instead."
    ]


def _epoch_warnings(plan: Plan) -> list[str]:
    wanted, there = plan.num_steps * plan.job.num_tokens, plan.store.num_tokens
    if there is None or wanted <= 1.1 * there:
        return []
    return [f"The corpus has {there / 1e6:,.1f}M tokens: {wanted / there:.1f} epochs."]


def _model_warnings(plan: Plan) -> list[str]:
    beside = {
        "data=online: the forward passes of the models": plan.store.online,
        "training.recovered_tokens: copies of whole models on every GPU (2 bytes a parameter in bf16)": (
            plan.has_recovered
        ),
    }
    told = "their memory and the time they take on the same GPUs are not part of this plan."
    return [f"{what}, {told}" for what, is_there in beside.items() if is_there]
