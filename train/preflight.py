"""python -m train.preflight experiment=STUDY[/PAIR] [gpus=8 gpu=h100 walltime=4:00:00]: whether training can work.

What a job would end with, minutes or hours later, is said before: a store that is missing, memory that does not suffice
(by the plan), a time limit in which nothing would be saved, a job that starts again and again in vain. Scripts ask
before a job is submitted and when it starts. Exit status 2 and one line for what must be mended; else the pairs, each
with what selects it, and the folder of outputs.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from extract.command import experiment_of, pairs_of, run
    from extract.errors import BadInput
    from extract.remote import is_url
    from train.config import TrainSettings
    from train.gpus import GPUS
    from train.plan import PlanSettings, make_plan
    from train.plan_options import GIB, Option, Plan, choice, usable_bytes
    from train.restarts import note_run_start
    from train.runs import run_folder, selected_pair

# Seconds before its end at which a job is told to save (slurm/*.sh).
NOTICE_S = 120
LAST_LINES = 50  # of metrics.jsonl, that tell how fast the run was


@dataclass
class PreflightSettings(PlanSettings):
    """The settings of the plan, and what else decides whether a job can work."""

    # As for the plan; auto = what this process sees; none = not known. Where there is none, nothing is checked of it.
    gpu: str = "auto"
    # Time limit of the job as Slurm writes it: 30 (minutes), hours:minutes:seconds, days-hours:...; null = none.
    walltime: str | None = None
    # The longest that the job's partition allows, written as that; null = not known.
    partition_limit: str | None = None
    # Seconds from the start of a job to its first step.
    startup_s: float = 60.0
    # Whether activations must be there already: not before the jobs that make them.
    needs_store: bool = True


def main(settings: PreflightSettings) -> None:
    pairs = pairs_of(settings)
    for pair in pairs:
        check(pair)
    for pair in pairs:
        print(f"pair {selected_pair(pair)} {pair.composed_from[0]}")
    print(f"outputs {settings.outputs}")


def check(settings: PreflightSettings) -> None:
    """BadInput for what would keep the job of one pair from working."""
    folder = run_folder(settings, experiment_of(settings))
    if settings.needs_store:
        check_store(settings)
        note_run_start(settings, folder)
    plan = plan_for(settings)
    if plan is not None:
        check_memory(settings, plan)
    check_walltime(settings, tokens_per_second(settings, folder, plan))


def check_store(settings: TrainSettings) -> None:
    """BadInput, with the command that makes them, where stored activations or tokens are missing."""
    if is_url(settings.store):
        return
    needed = {settings.tokens_folder: "extract.tokens"}
    if settings.data.mode == "stored":
        places = [settings.place(member) for member in settings.pairs[selected_pair(settings)]]
        folders = [settings.activations_folder(place.model, place.hookpoint) for place in places]
        needed |= dict.fromkeys(folders, "extract.activations")
    for folder, module in needed.items():
        if (folder / "manifest.json").exists():
            continue
        state = "is not complete" if any(folder.glob("shard-*.tar")) else "does not exist"
        script = "slurm/tokens.sh" if module == "extract.tokens" else "slurm/extract.sh"
        raise BadInput(
            f"store={settings.store}: {folder} {state}. Run `python -m {module} experiment={settings.study}`, or "
            f"{script}, to its end first."
        )


def plan_for(settings: PreflightSettings) -> Plan | None:
    """The plan on the GPU that is named or seen; None where there is none."""
    if settings.training.device == "cpu" or settings.gpu == "none":
        return None
    if settings.gpu == "auto":
        if not torch.cuda.is_available():
            return None
        seen = torch.cuda.get_device_properties(0)
        memory_gib = settings.gpu_memory_gib or seen.total_memory / GIB
        settings = replace(settings, gpu=kind_of(seen.name), gpu_memory_gib=memory_gib)
    return make_plan(settings)


def kind_of(name: str) -> str:
    """The data sheet of a GPU by the name that its driver gives: "NVIDIA A100-SXM4-80GB" -> a100; h100 if unknown: only
    times are estimated from it.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    known = [kind for kind in GPUS if set(kind.split("_")) <= set(words)]
    return max(known, key=len, default="h100")


def check_memory(settings: PreflightSettings, plan: Plan) -> None:
    """BadInput where the chosen engine needs more than a GPU has."""
    engine = settings.engine
    options = [option for option in plan.options if _is_chosen(option, settings)]
    if not options:
        return
    option = min(options, key=lambda option: option.peak)
    if option.fits:
        return
    raise BadInput(
        f"engine={engine.name} on {settings.gpus} x {settings.gpu} needs {option.peak / GIB:.1f} GiB on each GPU, and "
        f"a step may fill {usable_bytes(plan.machine.gpu) / GIB:.1f} of {plan.machine.gpu.memory_gib:g} GiB. What "
        f"would do: {choice(plan)} (python -m train.plan shows all.)"
    )


def _is_chosen(option: Option, settings: TrainSettings) -> bool:
    layout, engine = option.layout, settings.engine
    if layout.engine != engine.name:
        return False
    return engine.name != "deepspeed" or layout.zero_stage == engine.zero_stage


def tokens_per_second(settings: TrainSettings, folder: Path, plan: Plan | None) -> float | None:
    """Measured in an earlier start of this run, else planned; None where nothing is known."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()[-LAST_LINES:] if path.exists() else []
    name = "speed/tokens_per_second"
    measured = [rate for line in lines if line.endswith("}") and (rate := json.loads(line).get(name))]
    if measured:
        return median(measured)
    if plan is None:
        return None
    options = [option for option in plan.options if _is_chosen(option, settings)]
    return max((plan.job.num_tokens / option.time.step for option in options), default=None)


def check_walltime(settings: PreflightSettings, rate: float | None) -> None:
    """BadInput for a time limit that ends before the first checkpoint: such a job would never get any further."""
    if settings.walltime is None:
        return
    limit, training = seconds_of(settings.walltime), settings.training
    if settings.partition_limit and limit > seconds_of(settings.partition_limit):
        raise BadInput(
            f"The time limit, {settings.walltime}, exceeds that of the partition, {settings.partition_limit}: Slurm "
            f"would let the job wait for ever. Ask for less, SBATCH_TIMELIMIT={settings.partition_limit}: it is "
            f"requeued and continues, as often as it needs."
        )
    tokens = min(training.checkpoint_every * training.num_tokens_per_step or math.inf, training.num_tokens)
    interval = tokens / rate if rate and training.checkpoint_every else 0.0
    needed = settings.startup_s + interval
    if limit - NOTICE_S >= needed:
        return
    parts = f"start-up {settings.startup_s:.0f} s, notice to save {NOTICE_S} s"
    parts += f", {interval:.0f} s to a checkpoint at {rate:,.0f} tokens/s" if interval else ""
    raise BadInput(
        f"The time limit, {settings.walltime} ({limit:.0f} s), is shorter than one checkpoint interval with what comes "
        f"before and after it, {needed + NOTICE_S:.0f} s ({parts}). Ask for more time (sbatch --time=), or lower "
        f"training.checkpoint_every={training.checkpoint_every}."
    )


def seconds_of(text: str) -> float:
    """Slurm's times: 30 (minutes), 5:00, 2:00:00, 1-12, 1-12:30, 1-12:30:00, UNLIMITED."""
    if text.upper() in ("UNLIMITED", "INFINITE", "NOT_SET", "PARTITION_LIMIT"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise BadInput(f"walltime={text} is no time. Write it as Slurm does: 30 (minutes), 2:00:00 or 1-12:00:00.")
    days, *clock = (int(part) if part is not None else None for part in match.groups())
    given = [part for part in clock if part is not None]
    if days is None:  # minutes[:seconds], or hours:minutes:seconds
        hours, minutes, seconds = given if len(given) == 3 else [0, *given, 0][:3]
    else:
        hours, minutes, seconds = [*given, 0, 0][:3]
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


if __name__ == "__main__":
    run(PreflightSettings, main)
