"""What GPUs can do, from their vendor's data sheets: dense matrix products, memory, links. For planning only.

`memory_gib` is what PyTorch sees of it, a little less than the name of the card says.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from extract.errors import BadInput


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU."""

    name: str
    # Dense products in TFLOP/s: bf16 on tensor cores, and fp32 as PyTorch computes it by default, without them.
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    # GB/s between memory and processor.
    memory_gbps: float
    # GB/s that it sends to the other GPUs of its node: NVLink where it has it, else PCIe.
    link_gbps: float

    def tflops(self, precision: str) -> float:
        """Peak of products in `precision`, fp32 or bf16."""
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 2250, 75, 178, 7700, 900),
        Gpu("h200", 989, 67, 139, 4800, 450),
        Gpu("gh200", 989, 67, 94.5, 4000, 450),
        Gpu("h100", 989, 67, 79.1, 3350, 450),
        Gpu("h100_pcie", 756, 51, 79.1, 2000, 64),
        Gpu("a100", 312, 19.5, 79.1, 2039, 300),
        Gpu("a100_40gb", 312, 19.5, 39.4, 1555, 300),
        Gpu("l40s", 362, 91.6, 44.4, 864, 32),
        Gpu("rtx_a6000", 155, 38.7, 47.4, 768, 32),
        Gpu("a40", 150, 37.4, 44.4, 696, 32),
        Gpu("rtx_4090", 165, 82.6, 23.5, 1008, 32),
        Gpu("rtx_3090", 71, 35.6, 23.6, 936, 16),
        Gpu("a10", 125, 31.2, 22.0, 600, 32),
        Gpu("l4", 121, 30.3, 22.0, 300, 32),
    )
}


# Parts of a device's name that make it another GPU than the one that it is named after.
OTHERS = {"mig", "nvl", "max", "laptop", "mobile"}


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, "NVIDIA A100-SXM4-80GB"; None where it is not known."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    known = [gpu for gpu in GPUS.values() if set(gpu.name.split("_")) <= words and not words & OTHERS]
    return max(known, key=lambda gpu: len(gpu.name), default=None)


def gpu_named(
    name: str, memory_gib: float | None, tflops: float | None, memory_gbps: float | None, link_gbps: float | None
) -> Gpu:
    """A known GPU, with the caller's own numbers in place of its own where they are given; any other name needs all.

    BadInput for an unknown one, with the known ones and the settings that describe another.
    """
    name = name.lower().replace("-", "_")
    own: dict[str, Any] = {"memory_gib": memory_gib, "memory_gbps": memory_gbps, "link_gbps": link_gbps}
    own |= {"bf16_tflops": tflops, "fp32_tflops": tflops}
    given = {key: value for key, value in own.items() if value is not None}
    for key, value in given.items():
        if not value > 0:
            raise BadInput(f"gpu_{key.removeprefix('bf16_')}={value} must be greater than 0.")
    if name not in GPUS and len(given) < len(own):
        nearest = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise BadInput(
            f"gpu={name} is not known. {hint}Known: {', '.join(GPUS)}. For another, give its own numbers: "
            "gpu_memory_gib=, gpu_tflops= (in training.precision), gpu_memory_gbps= and gpu_link_gbps=."
        )
    return replace(GPUS.get(name, Gpu(name, 0, 0, 0, 0, 0)), **given)
