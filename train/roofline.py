"""How much of what the GPUs could do a run attains: the time that a step needs at their peak rates
(`train.step_time`) over the time that it takes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from train.config import TrainSettings
from train.data import TrainingData
from train.gpus import gpu_of
from train.job import Job, Layout
from train.plan import PlanSettings
from train.step_time import Machine, step_time
from train.world import World


class Roofline:
    """Of one job in one layout. Links between nodes are taken as `train.plan` takes them."""

    def __init__(self, job: Job, layout: Layout, machine: Machine):
        self._job, self._layout, self._machine = job, layout, machine

    @classmethod
    def of(cls, settings: TrainSettings, data: TrainingData, world: World) -> Roofline | None:
        """That of a run; None where it has no GPU, or one whose rates are not known."""
        gpu = gpu_of(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
        if gpu is None:
            return None
        engine, num_ranks = settings.engine, world.everyone.size
        stage = engine.zero_stage if engine.name == "deepspeed" else 0
        layout = Layout(engine.name, num_ranks, stage, engine.offload_optimizer, engine.ranks_per_copy)
        gpus_per_node = world.place.local_size or num_ranks
        machine = Machine(gpu, num_ranks, gpus_per_node, 1.0, PlanSettings.network_gbps, math.inf)
        return cls(_job(settings, data), layout, machine)

    def share(self, tokens_per_second: float, num_dead: int) -> float:
        """What is attained at a speed of all ranks together, with `num_dead` latents for AuxK."""
        job = replace(self._job, num_dead=num_dead)
        return step_time(job, self._layout, self._machine).step * tokens_per_second / job.num_tokens


def _job(settings: TrainSettings, data: TrainingData) -> Job:
    crosscoder, training, token = settings.crosscoder, settings.training, data.buffer(1)
    parts = [part for part in (token.codes_ND, token.scales_N) if part is not None]
    return Job(
        num_tokens=training.num_tokens_per_step,
        num_models=len(data.models),
        d_model=data.d_model,
        num_latents=crosscoder.num_latents,
        k=crosscoder.k,
        has_delta=crosscoder.delta_weight > 0,
        num_micro_steps=training.num_micro_steps,
        step=training.step,
        precision=training.precision,
        stored_token_bytes=sum(part.nbytes for part in parts),
    )
