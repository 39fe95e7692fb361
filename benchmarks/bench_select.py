"""Exact selection of k * B scores of a batch against torch.topk on the flattened matrix.

python -m benchmarks.bench_select
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import machine, ratio
from train.batch_topk import select

SHAPES = [(1024, 4096, 24), (1024, 16384, 50), (2048, 32768, 100)]  # tokens, latents, k


def main() -> None:
    print(machine())
    for num_tokens, num_latents, k in SHAPES:
        scores_BL = torch.randn(num_tokens, num_latents, generator=torch.Generator().manual_seed(0)).relu()
        slow, fast, times = ratio(partial(flat_topk, scores_BL, k), partial(select, scores_BL, k * num_tokens))
        print(
            f"selection: B={num_tokens} L={num_latents} k={k}: torch.topk {slow:.4f} s, select {fast:.4f} s, "
            f"select is {times:.1f} times faster"
        )


def flat_topk(scores_BL: Tensor, k: int) -> Tensor:
    return scores_BL.flatten().topk(k * len(scores_BL), sorted=False).indices


if __name__ == "__main__":
    main()
