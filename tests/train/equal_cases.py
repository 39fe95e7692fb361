"""Which engines are compared on how many ranks, in which form of the step and with which settings."""

from __future__ import annotations

from dataclasses import replace

import torch
from equal import Case

FORMS = ("readable", "sparse")
DIVIDED = ("fsdp", "deepspeed", "latent")
MATRIX = [Case("single", 1, form) for form in FORMS]
MATRIX += [Case(engine, ranks, form) for engine in DIVIDED for ranks in (1, 2, 4) for form in FORMS]

# Weights in two copies, of two ranks each.
TWO_COPIES = [Case(engine, 4, form, {"ranks_per_copy": 2}) for engine in ("fsdp", "latent") for form in FORMS]
STAGES = [
    Case("deepspeed", 2, "sparse", {"zero_stage": 1}),
    Case("deepspeed", 4, "readable", {"zero_stage": 1}),
    Case("deepspeed", 2, "sparse", {"zero_stage": 3}),
    Case("deepspeed", 4, "readable", {"zero_stage": 3}),
    Case("deepspeed", 2, "sparse", {"zero_stage": 2, "offload_optimizer": True}),
]
TWO_PARTS = {"training": {"num_micro_steps": 2}}
MICRO_STEPS = [
    *[Case(engine, ranks, form, **TWO_PARTS) for engine, ranks in (("single", 1), ("latent", 4)) for form in FORMS],
    *[Case(engine, 2, "sparse", **TWO_PARTS) for engine in DIVIDED],
    Case("fsdp", 2, "readable", **TWO_PARTS),
]
# Three models, some latents that one of them owns; rows that no number of ranks divides.
THREE = {"crosscoder": {"dedicated": 0.125}, "num_models": 3}
OTHERS = [Case(engine, 4, "sparse", **THREE) for engine in DIVIDED]
OTHERS += [Case("latent", 2, "readable", **THREE), Case("fsdp", 2, "readable", **THREE)]
OTHERS += [Case(engine, 4, "sparse", crosscoder={"num_latents": 50}) for engine in DIVIDED]

FROM_EACH = [*MATRIX, *TWO_COPIES, *STAGES, *MICRO_STEPS, *OTHERS]
# DeepSpeed does not compute in float64.
FREE = [replace(case, dtype=torch.float64) for case in FROM_EACH if case.engine != "deepspeed"]
NARROW = [replace(case, training={"precision": "bf16"}) for case in MATRIX if case.num_ranks < 4]
