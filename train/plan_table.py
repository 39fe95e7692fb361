"""A plan as text for 100 columns: what is trained, memory and time by engine, what to choose, warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from train.memory import COMPONENTS
from train.plan_options import GIB, Option, Plan, choice, duration, usable_bytes, warnings
from train.run_memory import SAVING, STEPS, VALIDATION
from train.step_time import sent_bytes, step_flops

LABEL_WIDTH, TOTAL_WIDTH = 28, 100
MIB = 2**20


def report(plan: Plan) -> str:
    """The whole plan."""
    parts = [_heading(plan), _facts(plan), _memory(plan), _time(plan), _advice(plan)]
    return "\n\n".join(parts)


def _heading(plan: Plan) -> str:
    machine = plan.machine
    gpu, precision = machine.gpu, plan.job.precision
    rates = f"{gpu.tflops(precision):,.0f} TFLOP/s {precision}, {gpu.memory_gbps / 1e3:.3g} TB/s"
    links = f", links {gpu.link_gbps:g} GB/s" if machine.num_gpus > 1 else ""
    reading = "" if plan.store.online else f"; the store is read at {machine.read_gbps:g} GB/s"
    return (
        f"{plan.title} on {machine.num_gpus} x {gpu.name} ({gpu.memory_gib:g} GiB, {rates}{links})\n"
        f"of these rates {machine.efficiency:.0%} are counted on{reading}"
    )


def _facts(plan: Plan) -> str:
    job = plan.job
    num_tokens, read = plan.num_steps * job.num_tokens, job.num_tokens * job.stored_token_bytes
    reading = f"{_size(read)} a step, {_size(num_tokens * job.stored_token_bytes)} in all, {plan.store.codec}"
    shape = f"L {job.num_latents:,} x {job.num_models} models of D {job.d_model:,}, k {job.k}"
    shape += f"; AuxK as for {job.num_dead:,} dead latents" if job.num_dead else ""
    disk = {name: size for name, size in plan.disk.items() if size}
    rows = {
        "parameters": _count(job.num_parameters),
        "shape": shape,
        "tokens": f"{num_tokens / 1e6:,.1f} M in {plan.num_steps:,} steps of {job.num_tokens:,}",
        "work": f"{step_flops(job) / 1e12:.3g} TFLOP a step, training.step={job.step}",
        "reading": "nothing: activations are computed while training" if plan.store.online else reading,
        "disk": f"{_size(sum(disk.values()))}: " + ", ".join(f"{name} {_size(size)}" for name, size in disk.items()),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())


def _memory(plan: Plan) -> str:
    names = [name for name in COMPONENTS if any(option.memory.get(name) for option in plan.options)]
    unit, size = ("GiB", GIB) if max(option.peak for option in plan.options) > GIB / 2 else ("MiB", MIB)
    usable = usable_bytes(plan.machine.gpu) / size

    def row(name: str) -> str:
        return _row(name, plan, lambda option: _number(option.memory.get(name, 0) / size))

    def largest_of(part: str) -> str:
        return _row(f"  in {part}", plan, lambda option: _number(sum(option.parts[part].values()) / size))

    rows = [*map(row, names), _row("peak", plan, lambda option: _number(option.peak / size))]
    rows += map(largest_of, (STEPS, VALIDATION, SAVING))
    rows += [_row(f"of {usable:,.1f} usable", plan, lambda option: "fits" if option.fits else "too large")]
    rows += [_row("of the host", plan, lambda option: _number(option.host / size))]
    return "\n".join([_header(f"memory per GPU, {unit}", plan), *rows])


def _time(plan: Plan) -> str:
    names = list(dict.fromkeys(name for option in plan.options for name in option.time.parts))

    def row(name: str) -> str:
        return _row(name, plan, lambda option: _number(1e3 * option.time.parts.get(name, 0)))

    rows = [
        *map(row, names),
        _row("communication", plan, lambda option: _number(1e3 * option.time.communication)),
        _row("reading, beside the rest", plan, lambda option: _number(1e3 * option.time.read)),
        _row("step", plan, lambda option: _number(1e3 * option.time.step)),
        _row("sent per GPU, MB", plan, lambda option: _number(sent_bytes(plan.job, option.layout) / 1e6)),
        _row("tokens a second", plan, lambda option: f"{plan.job.num_tokens / option.time.step:,.0f}"),
        _row("run", plan, lambda option: duration(plan.hours(option))),
    ]
    bounds = "\n".join(_bounds(plan))
    return "\n".join([_header("one step, ms", plan), *rows, bounds])


def _bounds(plan: Plan) -> list[str]:
    by_part: dict[str, list[str]] = {}
    for option in plan.options:
        by_part.setdefault(option.time.bound_by, []).append(option.layout.label)
    return [f"bound by {part}: {', '.join(labels)}" for part, labels in by_part.items()]


def _advice(plan: Plan) -> str:
    lines = [_wrapped("choose  ", choice(plan))]
    lines += [_wrapped("note    ", warning) for warning in warnings(plan)]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> str:
    return textwrap.fill(text, TOTAL_WIDTH, initial_indent=label, subsequent_indent=" " * len(label))


def _header(title: str, plan: Plan) -> str:
    return _columns(title, [option.layout.label for option in plan.options])


def _row(name: str, plan: Plan, value: Callable[[Option], str]) -> str:
    return _columns(f"  {name}", [value(option) for option in plan.options])


def _columns(name: str, texts: list[str]) -> str:
    """Columns as wide as fit, up to 11 characters."""
    width = min(11, (TOTAL_WIDTH - LABEL_WIDTH) // len(texts))
    return f"{name:<{LABEL_WIDTH}}" + "".join(f"{text:>{width}}" for text in texts)


def _number(value: float) -> str:
    """Two decimals below a hundred; a dash for nothing."""
    if not value:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _size(size: float) -> str:
    return _scaled(size, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3})


def _count(count: float) -> str:
    return _scaled(count, {"B": 1e9, "M": 1e6, "k": 1e3})


def _scaled(value: float, units: dict[str, float]) -> str:
    """In the largest unit that is not larger than the value."""
    unit = next((unit for unit in units if value >= units[unit]), list(units)[-1])
    return f"{value / units[unit]:.3g} {unit}"
