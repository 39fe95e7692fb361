"""Compiles the kernels for GPUs that need not be there, down to machine code: python compile_kernels.py

A process of its own: Triton's interpreter, which other tests turn on, replaces the compiler.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from train import kernels

CAPABILITIES = (80, 90)
INDICES = {"start_ptr": "*i64", "token_ptr": "*i64", "latent_ptr": "*i64", "width": "i32", "num_codes": "i32"}
ROWS = ("W_dec_ptr", "x_ptr", "grad_ptr", "copy_ptr")  # what may be bf16
NUMBERS = {"beta1": "fp32", "beta2": "fp32", "epsilon": "fp32", "d_model": "i32"}
KERNELS = [
    (kernels._decode, {"BLOCK": 1024}),
    (kernels._code_gradients, {"NUM": 8, "BLOCK": 128}),
    (kernels._row_gradients, {"ACCUMULATE": False, "BLOCK": 1024}),
    (kernels._row_gradients, {"ACCUMULATE": True, "BLOCK": 64}),
    (kernels._adam_rows, {"NUM_BLOCKS": 7, "BLOCK": 512}),
    (kernels._adam_rows, {"norms_ptr": None, "NUM_BLOCKS": 14, "BLOCK": 512}),
]


def signature(kernel: triton.JITFunction, constants: dict[str, object], rows: str) -> dict[str, str]:
    types = {**dict.fromkeys(ROWS, rows), **INDICES, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
    return {name: types.get(name, "*fp32") for name in kernel.arg_names}


def main() -> None:
    for capability in CAPABILITIES:
        for rows in ("*bf16", "*fp32"):
            for kernel, constants in KERNELS:
                source = ASTSource(kernel, signature(kernel, constants, rows), constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                print(kernel.__name__, capability, rows, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
