"""Predicted peaks of memory against those that the profiler measures on real engines, and how engines share them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from memory_trace import BLOCKS, PUBLISHING, SAVING, STEP, measured_peaks
from memory_trace import VALIDATION as VALIDATING
from pool import pool_of

from train.job import Job, Layout
from train.memory import GRADIENTS, MOMENTS, OPERANDS, WEIGHTS, peak_memory, state_memory, stored_tokens
from train.run_memory import SAVING as PUBLISHED
from train.run_memory import STEPS, VALIDATION, checkpoint_copies, host_state, published_copy, run_memory
from train.world import World

# Tokens, d_model, latents, k; with small weights, so that what a step adds to them is no small part of the peak.
WIDE = Job(2048, 2, 128, 512, 16)
DENSE = Job(1024, 2, 64, 1024, 100)
MANY_LATENTS = Job(1024, 2, 32, 4096, 16)
HEADLINE = Job(2048, 2, 3584, 114_688, 100, precision="bf16")
FSDP = [Layout("fsdp", 2), Layout("fsdp", 4, ranks_per_copy=2)]
STAGES = [Layout("deepspeed", 2, stage) for stage in (1, 2, 3)]
OFFLOADED = [Layout("deepspeed", 2, stage, offload_optimizer=True) for stage in (2, 3)]
LATENT = [Layout("latent", 2), Layout("latent", 4, ranks_per_copy=2)]
# On two ranks and more: many tokens for the weights, and weights that most of the memory is.
LIGHT, HEAVY = WIDE, Job(256, 2, 512, 2048, 8)


def job_of(shape: Job, step: str = "sparse", precision: str = "fp32", share_dead: float = 0.0, **changes: Any) -> Job:
    num_dead, token_bytes = int(share_dead * shape.num_latents), 4 * shape.width
    return replace(shape, step=step, precision=precision, num_dead=num_dead, stored_token_bytes=token_bytes, **changes)


def measured_alone(job: Job) -> int:
    """The largest of the steps."""
    return max(measured_peaks(World.alone(), job, Layout("single"))[STEP])


def expect_enough(predicted: float, measured: list[int]) -> None:
    """A prediction may promise a little more than the rank that needs most, and hardly less."""
    numbers = f"{predicted / 1e6:.2f} MB for {[round(peak / 1e6, 2) for peak in measured]}"
    assert 0.95 * max(measured) <= predicted <= 1.25 * max(measured), numbers


@pytest.mark.parametrize("share_dead", [0, 0.1, 0.6])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", ["sparse", "readable"])
@pytest.mark.parametrize("shape", [WIDE, DENSE, MANY_LATENTS], ids=["wide", "dense", "many_latents"])
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(
    shape: Job, step: str, precision: str, share_dead: float
):
    job = job_of(shape, step, precision, share_dead)
    measured = measured_alone(job)
    predicted = sum(peak_memory(job, Layout("single"), "cpu").values())
    state = sum(state_memory(job, Layout("single"), "cpu").values())
    assert predicted == pytest.approx(measured, rel=0.15)
    assert state < 0.8 * measured, "the case says little about a step"


def measured_on(layout: Layout, job: Job) -> dict[str, list[int]]:
    """The largest peak of each part of a run, on every rank."""
    ranks = pool_of(layout.num_ranks).run(measured_peaks, job, layout)
    return {part: [max(peaks[part]) for peaks in ranks] for part in BLOCKS}


def labelled(value: Any) -> str:
    return f"{value.label} on {value.num_ranks}" if isinstance(value, Layout) else f"{value.precision}-{value.step}"


@pytest.mark.parametrize(
    ("layout", "job"),
    [
        *((layout, job_of(LIGHT, "sparse", "fp32", 0.3)) for layout in [*FSDP, *LATENT]),
        *((layout, job_of(HEAVY, "readable", "fp32", 0.3)) for layout in (FSDP[0], STAGES[1], LATENT[0])),
    ],
    ids=labelled,
)
def test_so_are_those_of_ranks(layout: Layout, job: Job):
    expect_enough(sum(peak_memory(job, layout, "cpu").values()), measured_on(layout, job)[STEP])


@pytest.mark.parametrize(
    ("layout", "job"),
    [
        *((layout, job_of(HEAVY, "sparse", "bf16")) for layout in [*FSDP, *STAGES, *LATENT, *OFFLOADED]),
        *((layout, job_of(HEAVY, "sparse", "fp32")) for layout in (FSDP[0], STAGES[2])),
    ],
    ids=labelled,
)
def test_those_of_steps_validation_and_saving_are_told_apart(layout: Layout, job: Job):
    """On a CPU device and host are one, so what a run takes of its host counts too."""
    device = {part: sum(memory.values()) for part, memory in run_memory(job, layout, "cpu").items()}
    held = host_state(job, layout)
    lasting = sum(state_memory(job, layout, "cpu").values()) + job.stored_token_bytes * stored_tokens(job, layout)
    measured = measured_on(layout, job)
    expect_enough(device[STEPS] + held, measured[STEP])
    expect_enough(device[VALIDATION] + held, measured[VALIDATING])
    expect_enough(lasting + held + checkpoint_copies(job, layout), measured[SAVING])
    expect_enough(device[PUBLISHED] + held + published_copy(job, layout), measured[PUBLISHING])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dividing_never_needs_more_than_one_process(precision: str, device: str):
    job = replace(HEADLINE, precision=precision, num_dead=11_468)
    single = sum(peak_memory(job, Layout("single"), device).values())
    for layout in (
        *(Layout(engine, 8) for engine in ("fsdp", "latent")),
        *(Layout("deepspeed", 8, n) for n in (1, 2, 3)),
    ):
        assert sum(peak_memory(job, layout, device).values()) < single, layout.label


@pytest.mark.parametrize("step", ["sparse", "readable"])
def test_a_delta_term_is_counted(step: str):
    job = job_of(WIDE, step, has_delta=True)
    assert sum(peak_memory(job, Layout("single"), "cpu").values()) == pytest.approx(measured_alone(job), rel=0.15)


def test_micro_batches_need_the_memory_of_one():
    """A quarter of the tokens at a time: both the peak and its prediction fall, the latter by no more."""
    whole, parts = job_of(WIDE), job_of(WIDE, num_micro_steps=4)
    measured = measured_alone(parts)
    predicted = sum(peak_memory(parts, Layout("single"), "cpu").values())
    assert predicted == pytest.approx(measured, rel=0.2) and measured < 0.9 * measured_alone(whole)


def test_the_sparse_step_does_not_grow_with_the_matrix_of_codes():
    """Eight times the tokens: dense autograd holds several more (B, L) matrices, the sparse step none."""
    small, large = replace(MANY_LATENTS, num_tokens=512), replace(MANY_LATENTS, num_tokens=4096)
    matrix = 4 * (large.num_tokens - small.num_tokens) * large.num_latents
    grown = {
        step: measured_alone(job_of(large, step)) - measured_alone(job_of(small, step))
        for step in ("sparse", "readable")
    }
    assert grown["sparse"] < matrix / 2 and grown["readable"] > 3 * matrix


def test_state_of_the_headline_job_by_hand():
    """16 bytes a parameter (26.3 GB) and a bf16 copy of both matrices; a rank of eight has an eighth, or gathers."""
    parameters = 2 * 114_688 * 7_168 + 114_688 + 7_168
    single = state_memory(HEADLINE, Layout("single"))
    assert single[WEIGHTS] + single[GRADIENTS] + single[MOMENTS] == 16 * parameters
    assert single[OPERANDS] == 2 * 2 * 114_688 * 7_168
    latent = state_memory(HEADLINE, Layout("latent", 8))
    assert all(latent[name] == single[name] / 8 for name in single)
    fsdp = state_memory(HEADLINE, Layout("fsdp", 8))
    assert fsdp[WEIGHTS] + fsdp[MOMENTS] == 12 * parameters / 8 and fsdp[GRADIENTS] == 4 * parameters
    assert fsdp[OPERANDS] == 0 and state_memory(HEADLINE, Layout("fsdp", 16, ranks_per_copy=8)) == fsdp
    first, third = (state_memory(HEADLINE, Layout("deepspeed", 8, stage)) for stage in (1, 3))
    assert first[WEIGHTS] == first[GRADIENTS] == 4 * parameters and first[MOMENTS] == 8 * parameters / 8
    assert third[WEIGHTS] == 4 * parameters / 8 and third[GRADIENTS] == 4 * parameters + 2**22
    on_host = state_memory(HEADLINE, Layout("deepspeed", 8, 2, offload_optimizer=True))
    assert on_host[MOMENTS] == 0 and on_host[WEIGHTS] == 4 * parameters


def test_the_headline_peak_of_fsdp_by_hand():
    """Whole gradients and rows of all; then either bf16 weights and what a step takes, or the rows' gradients."""
    matrices, biases = 2 * 114_688 * 7_168, 114_688 + 7_168
    peak = peak_memory(HEADLINE, Layout("fsdp", 8))
    assert peak[OPERANDS] == 2 * matrices + 4 * biases and peak[GRADIENTS] == 4 * (matrices + biases)


def test_more_ranks_never_need_more():
    for engine, stage in (("fsdp", 0), ("deepspeed", 1), ("deepspeed", 3), ("latent", 0)):
        peaks = [sum(peak_memory(HEADLINE, Layout(engine, ranks, stage)).values()) for ranks in (2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True)
