"""One training step, sparse against readable, from the same weights and batch; the readable form ranks by torch.topk.

python -m benchmarks.bench_step

Reported for each shape: the time of forward, selection, losses and backward; the same with clipping and Adam; the
share of the sparse step that the encoder product alone takes; the peak of memory allocated during a step, gradients
included; the largest difference of the gradients. Where there is a GPU, the headline shape follows: tokens a second,
and the share of the time that the encoder product would take at the rate of a large product on the same device.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import machine, ratio
from extract.devices import choose_device
from train.config import CrosscoderConfig, TrainingConfig, TrainSettings
from train.encoder import encoder_chunks
from train.engine import Engine
from train.pieces import Piece, SavedState, TrainingState
from train.world import World


class Shape(NamedTuple):
    num_tokens: int
    d_model: int
    num_latents: int
    k: int
    num_dead: int = 0
    precision: str = "fp32"

    def __str__(self) -> str:
        return (
            f"B={self.num_tokens} M*D={2 * self.d_model} L={self.num_latents} k={self.k} dead={self.num_dead} "
            f"{self.precision}"
        )


SHAPES = [
    Shape(1024, 576, 16384, 50),
    Shape(1024, 576, 16384, 50, num_dead=1600),
    Shape(2048, 576, 32768, 100),
    Shape(1024, 576, 16384, 50, precision="bf16"),
]
HEADLINE = [Shape(num_tokens, 3584, 114688, 100, precision="bf16") for num_tokens in (4096, 16384)]


class Subject:
    """One crosscoder and one batch, as both forms of the step see them."""

    def __init__(self, shape: Shape, step: str):
        config = CrosscoderConfig(num_latents=shape.num_latents, k=shape.k)
        training = TrainingConfig(num_tokens_per_step=shape.num_tokens, step=step, precision=shape.precision)
        mean, scale = torch.zeros(2, shape.d_model), torch.ones(2)
        settings = TrainSettings(
            pairs={"pair": ["base", "tuned"]}, hookpoint="block20", crosscoder=config, training=training
        )
        self.device = choose_device("auto", "training.device")
        self.engine = Engine(settings, ["base", "tuned"], shape.d_model, mean, scale, World.alone(self.device))
        generator = torch.Generator().manual_seed(0)
        self.x_BMD = torch.randn(shape.num_tokens, 2, shape.d_model, generator=generator).to(self.device)
        self.engine.initialise(self.x_BMD)
        dead_L = torch.arange(shape.num_latents, device=self.device) < shape.num_dead
        self._num_dead, self._counters = shape.num_dead, _counters(torch.where(dead_L, config.dead_after_tokens, 0))
        self.engine._clocks.load(self._counters)

    def gradients(self) -> list[Tensor]:
        """Selection, forward, losses, backward."""
        self._kill()
        batches = self.engine._batches(self.x_BMD, None)
        with self.engine._placement.whole() as operands:
            self.engine._differentiate(operands, batches, measured=False)
        return [weight.grad for weight in self.engine.crosscoder.parameters() if weight.grad is not None]

    def step(self) -> None:
        """All of a step that is not logged; where any are dead, the same latents are in each."""
        self._kill()
        self.engine.step(self.x_BMD, measured=False)

    def _kill(self) -> None:
        if self._num_dead:
            self.engine._clocks.load(self._counters)

    def encode(self) -> None:
        with self.engine._placement.whole() as operands:
            for _ in encoder_chunks(self.x_BMD.flatten(1), operands):
                pass


def _counters(silent_tokens_L: Tensor) -> SavedState:
    """The state of counters that tell which latents are dead."""
    tensors = {
        "silent_tokens": Piece.whole(silent_tokens_L),
        "auxk_candidates": Piece.whole(torch.zeros_like(silent_tokens_L, dtype=torch.uint8)),
    }
    return SavedState.of([TrainingState(tensors, {"threshold": None, "auxk_tokens": 0, "auxk_any": False})])


def main() -> None:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    print(machine())
    for shape in SHAPES:
        compare(shape)
    if torch.cuda.is_available():
        for shape in HEADLINE:
            headline(shape)


def compare(shape: Shape) -> None:
    """Sparse against readable in turn."""
    readable, sparse = Subject(shape, "readable"), Subject(shape, "sparse")
    slow, fast, times = ratio(readable.gradients, sparse.gradients)
    print(f"step: {shape}: readable {slow:.3f} s, sparse {fast:.3f} s, sparse is {times:.1f} times faster")
    whole, product, times = ratio(sparse.gradients, sparse.encode)
    print(f"  encoder product alone {product:.3f} s, {1 / times:.0%} of the sparse step's {whole:.3f} s")
    pairs = zip(readable.gradients(), sparse.gradients(), strict=True)
    difference = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    print(f"  gradients differ by {difference:.1e} of their norm at most")
    held = sum(gradient.nbytes for gradient in sparse.gradients())  # between steps: the readable form makes them anew
    peaks = [peak_bytes(subject.gradients, subject.device) / 2**20 for subject in (readable, sparse)]
    print(
        f"  at most allocated in a step: readable {peaks[0]:.0f} MiB, sparse {peaks[1] + held / 2**20:.0f} MiB "
        f"(without gradients {peaks[0] - held / 2**20:.0f} and {peaks[1]:.0f})"
    )
    slow, fast, times = ratio(readable.step, sparse.step)
    print(f"  with clipping and Adam: readable {slow:.3f} s, sparse {fast:.3f} s, {times:.1f} times faster")


def headline(shape: Shape) -> None:
    """Tokens a second of the whole step at full size, one form after the other: both together may not fit."""
    rate = product_rate()
    product = 2 * shape.num_tokens * shape.num_latents * 2 * shape.d_model
    for form in ("sparse", "readable"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = seconds_of(Subject(shape, form).step)
        except torch.OutOfMemoryError:
            print(f"headline: {shape}: {form} does not fit into the memory of this GPU")
            continue
        print(
            f"headline: {shape}: {form} {shape.num_tokens / seconds:,.0f} tokens/s with Adam, encoder roofline "
            f"{product / rate / seconds:.0%} (at {rate / 1e12:.0f} TFLOP/s), peak "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )


def product_rate() -> float:
    """FLOP/s of a large bf16 product on the GPU."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right)


def seconds_of(function: Callable[[], object], warm_up: int = 3, repeats: int = 10) -> float:
    """Mean seconds of a call when the GPU is kept busy, without waiting between calls."""
    for _ in range(warm_up):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest sum of what is allocated during a call and not yet freed."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return int(torch.tensor([0, *changes]).cumsum(0).max())


if __name__ == "__main__":
    main()
