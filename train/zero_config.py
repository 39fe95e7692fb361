"""DeepSpeed's configuration: what the settings decide, and a user's own JSON file (engine.deepspeed_json) within it.

A file may choose how DeepSpeed communicates, offloads and reports. What decides a result has one place, the settings of
crossdiff, and a file that speaks of it is refused with the setting to use instead. "auto" leaves a choice to crossdiff,
as files made for other trainers do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from extract.errors import BadInput

# What the settings decide, by DeepSpeed's name: where to say it instead.
_BATCHES, _PRECISION, _FIXED = "training.num_tokens_per_step and training.num_micro_steps", "training.precision", ""
OWNED = {
    "train_batch_size": _BATCHES,
    "train_micro_batch_size_per_gpu": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "managed_gradient_accumulation": _BATCHES,
    "optimizer": "training.lr and training.adam_betas",
    "scheduler": "training.lr, training.warmup_steps and training.decay_fraction",
    "gradient_clipping": "training.max_grad_norm",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _FIXED,
    "communication_data_type": _FIXED,
    "gradient_allreduce_op": _FIXED,
    "gradient_predivide_factor": _FIXED,
    "prescale_gradients": _FIXED,
    "zero_allow_untested_optimizer": _FIXED,
    "zero_force_ds_cpu_optimizer": _FIXED,
    "wandb": "tracking.mode",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
}
# What a file may set, and the ZeRO stages that have it.
ALL = (1, 2, 3)
OPTIONS = {
    "steps_per_print": ALL,
    "memory_breakdown": ALL,
    "dump_state": ALL,
    "comms_logger": ALL,
    "zero_optimization.reduce_bucket_size": ALL,
    "zero_optimization.overlap_comm": ALL,
    "zero_optimization.contiguous_gradients": ALL,
    "zero_optimization.reduce_scatter": ALL,
    "zero_optimization.use_multi_rank_bucket_allreduce": (1, 2),
    "zero_optimization.allgather_partitions": (1, 2),
    "zero_optimization.allgather_bucket_size": (1, 2),
}
# What crossdiff does not use, and files for other trainers leave open ("auto") or switch off: such entries say nothing.
UNUSED = {
    "activation_checkpointing",
    "autotuning",
    "comet",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "elasticity",
    "flops_profiler",
    "hybrid_engine",
    "progressive_layer_drop",
    "tensorboard",
    "zero_optimization.offload_param",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.sub_group_size",
}
ZERO = "zero_optimization."
# A gradient larger than the bucket is reduced where it lies; a smaller one is copied into the bucket first.
BUCKET_ELEMENTS = 1 << 20


def deepspeed_config(stage: int, offload_optimizer: bool, deepspeed_json: str | None) -> dict[str, Any]:
    """What deepspeed.initialize takes. BadInput, naming the key, for a file that cannot be followed."""
    config = _decided(stage, offload_optimizer)
    if deepspeed_json is not None:
        path = Path(deepspeed_json)
        for key, value in _read(path).items():
            if not _says_nothing(key, value, stage):
                _check_option(path, key, value, stage, offload_optimizer)
                ours = config.get(key)
                config[key] = ours | value if isinstance(ours, dict) else value
    zero = {key.removeprefix(ZERO): value for key, value in config.items() if key.startswith(ZERO)}
    return {key: value for key, value in config.items() if not key.startswith(ZERO)} | {"zero_optimization": zero}


def _decided(stage: int, offload_optimizer: bool) -> dict[str, Any]:
    """What the settings say, and defaults that suit few large weights, one gradient a step and no module's forward."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # gradients of micro-batches are added up before DeepSpeed sees them
        "gradient_clipping": 0.0,  # Adam clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        ZERO + "stage": stage,
        ZERO + "reduce_bucket_size": BUCKET_ELEMENTS,
        ZERO + "overlap_comm": False,
    }
    if stage == 3:
        config[ZERO + "stage3_param_persistence_threshold"] = 0  # small weights are gathered with the large ones
    else:
        config[ZERO + "use_multi_rank_bucket_allreduce"] = False  # a rank's part is sent to that rank alone
        config[ZERO + "compute_grad_norm"] = offload_optimizer  # known by then; stages with offload insist
    if offload_optimizer:
        config[ZERO + "offload_optimizer"] = {"device": "cpu"}
    return config


def _read(path: Path) -> dict[str, Any]:
    """A user's file, with the keys of zero_optimization beside the others."""
    try:
        user = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"engine.deepspeed_json={path} cannot be read ({error}). Give a JSON file.") from error
    zero = user.pop("zero_optimization", {}) if isinstance(user, dict) else None
    if not isinstance(zero, dict):
        raise BadInput(
            f"engine.deepspeed_json={path} does not hold an object, or in it zero_optimization does not. Give a "
            "configuration of DeepSpeed."
        )
    return user | {ZERO + key: value for key, value in zero.items()}


def _says_nothing(key: str, value: Any, stage: int) -> bool:
    """Whether an entry leaves a choice open, switches something off, or repeats what the settings say."""
    if key not in OWNED.keys() | OPTIONS.keys() | UNUSED:
        return False
    is_off = isinstance(value, dict) and (value.get("enabled", True) in (False, "auto") or value == {"device": "none"})
    return (
        is_off
        or value == "auto"
        or (key, value) in {ZERO + "stage": stage, "zero_allow_untested_optimizer": True}.items()
    )


def _check_option(path: Path, key: str, value: Any, stage: int, offload_optimizer: bool) -> None:
    if key == ZERO + "offload_optimizer" and offload_optimizer:
        _check_offload(path, value)
    elif key in OWNED:
        remedy = (
            f"and set {OWNED[key]}" if OWNED[key] else "for gradients are summed in float32, by an Adam of crossdiff"
        )
        raise BadInput(f"{path}: {key} is decided by crossdiff. Remove it from the file, {remedy}.")
    elif key not in OPTIONS:
        raise BadInput(
            f"{path}: crossdiff does not use DeepSpeed's {key}. Remove it; what a file may set: {', '.join(OPTIONS)}."
        )
    elif stage not in OPTIONS[key]:
        stages = " or ".join(f"engine.zero_stage={stage}" for stage in OPTIONS[key])
        raise BadInput(f"{path}: {key} has no meaning with engine.zero_stage={stage}. Remove it, or use {stages}.")


def _check_offload(path: Path, details: Any) -> None:
    if (
        not isinstance(details, dict)
        or details.get("device", "cpu") != "cpu"
        or details.keys() - {"device", "pin_memory"}
    ):
        raise BadInput(
            f"{path}: zero_optimization.offload_optimizer={details} is not supported. Adam's moments go to the memory "
            "of the CPU, and a file may set pin_memory there."
        )
