"""Memory of a run on one rank: of its steps, and of what comes between them; and what it takes of the host.

    steps         `train.memory`
    validation    float32 weights, whole where a step gathers them; codes of a chunk, reconstructions and their errors
    saving        whole matrices, one at a time, where ZeRO cut them; blocks of all ranks' rows of the latent engine

For a checkpoint each of R ranks copies its rows of weights and moments to the host, 12 N / R bytes. ZeRO has no rows:
they are made on the host, and are there twice while they are copied. Rank 0 has the whole crosscoder while it publishes
it, 4 N, but in fsdp, where it lies in the memory of the gradients. With engine.offload_optimizer the host has weights
for Adam, its moments, gradients and a buffer for them, 20 N / R bytes; in stages 1 and 2 a buffer of a matrix besides,
and so has the GPU.

Shapes: R ranks, N parameters of 4 bytes, W = M * D. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import replace

from train.job import FLOAT, Job, Layout
from train.latent import BLOCK_SIZE
from train.memory import (
    BATCH,
    CODES,
    INDEX,
    OPERANDS,
    SELECTION,
    Components,
    Part,
    add,
    encode_moment,
    largest,
    peak_memory,
    state_memory,
    stored_tokens,
)

STEPS, VALIDATION, SAVING = "steps", "validation", "saving"


def run_memory(job: Job, layout: Layout, device: str = "cuda") -> dict[str, Components]:
    """What is alive on a rank at the largest moment of each part of a run, by name; `device` is cuda or cpu."""
    return {
        STEPS: peak_memory(job, layout, device),
        VALIDATION: validation_memory(job, layout, device),
        SAVING: saving_memory(job, layout, device),
    }


def validation_memory(job: Job, layout: Layout, device: str = "cuda") -> Components:
    """While a batch of as many tokens as a step's is measured, with the weights themselves."""
    whole, copied = FLOAT * job.num_parameters, _copied_by_gloo(job, layout, device)
    gathered = whole if layout.zero_stage == 3 else 0
    exact = replace(job, precision="fp32", num_micro_steps=1, num_dead=0)
    part = Part.of(exact, layout)
    batch = {BATCH: job.stored_token_bytes * part.tokens}
    codes = part.codes * (2 * INDEX + FLOAT)
    moments: list[Components] = [
        encode_moment(exact, layout, part, device),
        {BATCH: part.batch, CODES: 2.25 * encode_moment(exact, layout, part, device)[CODES], SELECTION: codes},
        {BATCH: 5 * part.batch, SELECTION: codes},  # squares are summed in float64
    ]
    state = add(state_memory(job, layout, device), {BATCH: job.stored_token_bytes * stored_tokens(job, layout)})
    during = [add(add(state, {OPERANDS: gathered}), add(batch, moment)) for moment in moments]
    return largest([*during, add(state, {OPERANDS: gathered + copied})])


def saving_memory(job: Job, layout: Layout, device: str = "cuda") -> Components:
    """While a checkpoint is copied to the host, or the crosscoder of a finished run is put together."""
    matrix, copied = FLOAT * job.num_weights, _copied_by_gloo(job, layout, device)
    passed = copied
    if layout.engine == "deepspeed":  # whole, and for a checkpoint this rank's rows of it
        passed = matrix + max(copied, matrix / layout.num_ranks if device == "cuda" else 0)
    elif layout.latent_ranks > 1:
        block = min(FLOAT * BLOCK_SIZE, matrix / layout.latent_ranks)
        passed = block * (1 + layout.latent_ranks * (2 if device == "cpu" else 1))
    state = add(state_memory(job, layout, device), {BATCH: job.stored_token_bytes * stored_tokens(job, layout)})
    return add(state, {OPERANDS: passed})


def host_memory(job: Job, layout: Layout) -> float:
    """What a rank takes of its host's memory at most, besides batches that are read ahead."""
    return host_state(job, layout) + max(checkpoint_copies(job, layout), published_copy(job, layout))


def checkpoint_copies(job: Job, layout: Layout) -> float:
    """What a checkpoint is written from while training goes on, and on a GPU kept for the next one."""
    rows = 3 * FLOAT * job.num_parameters / layout.update_ranks
    return 2 * rows if layout.engine == "deepspeed" else rows


def published_copy(job: Job, layout: Layout) -> float:
    """The whole crosscoder on rank 0 while it is published, where no device has all of it."""
    divides = layout.engine == "deepspeed" or layout.latent_ranks > 1
    return FLOAT * job.num_parameters if divides else 0


def host_state(job: Job, layout: Layout) -> float:
    """What of the training state lies on the host."""
    if not layout.offload_optimizer:
        return 0
    parts = 5 * FLOAT * job.num_parameters / layout.num_ranks
    return parts + (FLOAT * job.num_weights if layout.zero_stage < 3 else 0)


def _copied_by_gloo(job: Job, layout: Layout, device: str) -> float:
    """gloo gathers a weight into memory of its own first."""
    gathers = layout.engine == "fsdp" or layout.zero_stage == 3
    return FLOAT * job.num_weights if gathers and device == "cpu" else 0
