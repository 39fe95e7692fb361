"""The most bytes that tensors of an engine take on a rank during a step, by the profiler's memory events."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from planted import settings_of
from torch.profiler import record_function

from benchmarks.peaks import peaks_of, traced_memory
from train.engine import Engine
from train.loader import RING
from train.pieces import Piece, SavedState, TrainingState
from train.saving import copied_to_host

# What is measured: steps, a validation before there is a threshold and one after, what a checkpoint and the crosscoder
# at the end need before they are written.
BLOCKS = STEP, VALIDATION, SAVING, PUBLISHING = "step", "validation", "saving", "publishing"
THRESHOLD_STEP = 2


def settings_for(job, layout):
    settings = settings_of(Path("unused"))
    crosscoder, training = settings.crosscoder, settings.training
    crosscoder.num_latents, crosscoder.k, crosscoder.dedicated = job.num_latents, job.k, 0.0
    crosscoder.dead_after_tokens, crosscoder.delta_weight = 10**6, float(job.has_delta)
    crosscoder.threshold_start_step = THRESHOLD_STEP
    training.num_tokens_per_step, training.step, training.precision = job.num_tokens, job.step, job.precision
    training.num_micro_steps = job.num_micro_steps
    options = {"ranks_per_copy": layout.ranks_per_copy}
    if layout.engine == "deepspeed":
        options = {"zero_stage": layout.zero_stage, "offload_optimizer": layout.offload_optimizer}
    settings.engine = replace(settings.engine, name=layout.engine, **options)
    return settings


def engine_for(world, job, layout):
    means, scales = torch.zeros(job.num_models, job.d_model), torch.ones(job.num_models)
    return Engine(settings_for(job, layout), ["base", "tuned"], job.d_model, means, scales, world)


def tokens_for(world, job):
    """(x, numbers) of this rank's tokens, as stored in float32."""
    return part_of(world.everyone, job, world.everyone.size > 1)


def part_of(group, job, numbered=True):
    """(x, numbers) of the tokens that a rank of a group reads."""
    x_BMD = torch.randn(job.num_tokens, job.num_models, job.d_model, generator=torch.Generator().manual_seed(0))
    token_b = torch.arange(group.rank, job.num_tokens, group.size)
    return x_BMD[token_b], token_b if numbered else None


def kill(engine, num_dead):
    """Make the first latents dead, whatever fired."""
    clocks, numbers = engine._clocks, torch.arange(engine.share.num_latents)
    silent = Piece.whole(torch.where(numbers < num_dead, 10**9, 0))
    pieces = {"silent_tokens": silent, "auxk_candidates": Piece.whole((numbers < 0).byte())}
    clocks.load(SavedState.of([TrainingState(pieces, clocks.values())]))


def measured_peaks(world, job, layout):
    """On this rank, in each of the blocks of `BLOCKS` that were measured: {block: [bytes]}."""
    x_bMD, token_b = tokens_for(world, job)
    with traced_memory() as profiler, tempfile.TemporaryDirectory() as folder:
        # As the loader holds tokens, those of the step first. Latents begin as directions of others, lest their own
        # stand out in the samples that the selection takes.
        ring = [x_bMD.roll(number, 2) for number in range(RING)]
        engine = engine_for(world, job, layout)
        engine.initialise(ring[1], token_b)
        kill(engine, job.num_dead)
        engine.step(ring[0], token_b=token_b)
        validate(engine, job)
        for _ in range(THRESHOLD_STEP):
            gc.collect()
            kill(engine, job.num_dead)
            with record_function(STEP):
                assert engine.step(ring[0], token_b=token_b)["train/dead"] == job.num_dead
        validate(engine, job)
        with record_function(SAVING):
            copied_to_host(engine.state().tensors)
        with record_function(PUBLISHING):
            engine.save_crosscoder(Path(folder, "crosscoder"), {})
    return dict(zip(BLOCKS, peaks_of(profiler, *BLOCKS), strict=True))


def validate(engine, job):
    """On a batch of as many tokens as a step's."""
    with record_function(VALIDATION):
        metrics = engine.evaluate(part_of(engine.share.tokens, job) for _ in range(2))
    assert metrics["val/l0"] > 0
