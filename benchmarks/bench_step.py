"""One training step, sparse against readable: forward, losses and gradients, the same weights and batch.

python -m benchmarks.bench_step
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import machine, ratio
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.initialisation import initialise
from train.losses import readable_forward, training_losses
from train.sparse import sparse_forward

SHAPES = [  # tokens, d_model, latents, k, dead latents
    (1024, 576, 4096, 24, 0),
    (1024, 576, 4096, 24, 400),
    (1024, 576, 16384, 50, 0),
]


def main() -> None:
    print(machine())
    for num_tokens, d_model, num_latents, k, num_dead in SHAPES:
        config = CrosscoderConfig(num_latents=num_latents, k=k)
        crosscoder = Crosscoder(config, ["base", "tuned"], d_model, "block15")
        x_BMD = torch.randn(num_tokens, 2, d_model, generator=torch.Generator().manual_seed(0))
        initialise(crosscoder, x_BMD, seed=0)
        dead_L = torch.arange(num_latents) < num_dead
        slow, fast, times = ratio(
            partial(step, readable_forward, crosscoder, x_BMD, dead_L),
            partial(step, sparse_forward, crosscoder, x_BMD, dead_L),
        )
        print(
            f"step: B={num_tokens} M*D={2 * d_model} L={num_latents} k={k} dead={num_dead}: "
            f"readable {slow:.3f} s, sparse {fast:.3f} s, sparse is {times:.1f} times faster"
        )


def step(forward: Callable, crosscoder: Crosscoder, x_BMD: Tensor, dead_L: Tensor) -> None:
    crosscoder.zero_grad()
    num_selected = crosscoder.config.k * len(x_BMD)
    training_losses(crosscoder.config, x_BMD, forward(crosscoder, x_BMD, num_selected, dead_L)).total.backward()


if __name__ == "__main__":
    main()
