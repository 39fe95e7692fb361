"""Bytes that ranks send in a step, as collectives are given them, against the formulas of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from memory_trace import engine_for, kill, tokens_for
from pool import pool_of

from benchmarks.traffic import RingTraffic
from train.job import Job, Layout
from train.step_time import sent_bytes

# Tokens, models, d_model, latents, k; tokens are stored in float32.
JOB = Job(256, 2, 384, 515, 8, stored_token_bytes=4 * 2 * 384)


def sent(world, job, layout):
    """In the second step, which nothing is prepared in any more."""
    x_bMD, token_b = tokens_for(world, job)
    engine = engine_for(world, job, layout)
    engine.initialise(x_bMD, token_b)
    engine.step(x_bMD, token_b=token_b)
    kill(engine, job.num_dead)
    with RingTraffic() as traffic:
        engine.step(x_bMD, measured=False, token_b=token_b)
    return dict(traffic.sent)


@pytest.mark.parametrize("num_dead", [0, 100])
@pytest.mark.parametrize(
    "layout",
    [
        *(Layout("fsdp", ranks) for ranks in (2, 4)),
        Layout("fsdp", 4, ranks_per_copy=2),
        *(Layout("latent", ranks) for ranks in (2, 4)),
        Layout("latent", 4, ranks_per_copy=2),
        *(Layout("deepspeed", 2, stage) for stage in (1, 2, 3)),
        Layout("deepspeed", 4, 2),
    ],
    ids=lambda layout: f"{layout.label} on {layout.num_ranks}",
)
def test_what_is_sent_is_what_the_plan_says(layout: Layout, num_dead: int):
    job = replace(JOB, num_dead=num_dead)
    for traffic in pool_of(layout.num_ranks).run(sent, job, layout):
        assert sum(traffic.values()) == pytest.approx(sent_bytes(job, layout), rel=0.01), traffic


@pytest.mark.parametrize("step", ["sparse", "readable"])
@pytest.mark.parametrize("num_dead", [0, 100])
@pytest.mark.parametrize("layout", [Layout("latent", 2), Layout("fsdp", 2)], ids=lambda layout: layout.label)
def test_also_in_several_micro_batches(layout: Layout, num_dead: int, step: str):
    """Weights are gathered once for all of them; of latents, errors are summed twice while one is dead."""
    job = replace(JOB, num_dead=num_dead, num_micro_steps=4, step=step)
    for traffic in pool_of(layout.num_ranks).run(sent, job, layout):
        assert sum(traffic.values()) == pytest.approx(sent_bytes(job, layout), rel=0.01), traffic
