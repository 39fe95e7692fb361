"""Whether the fast step learns what the readable one does: two runs over the same batches of a store, from one seed.

python -m benchmarks.bench_quality experiment=demo/base_simpo training.num_tokens=1024000 [outputs=PATH] [key=value ...]

Rounding differs, so the runs drift apart as any two runs would whose sums are taken in another order. Reported are the
largest relative difference of the loss over the first 100 steps, and each run's variance explained of held-out tokens
at the end, at its own threshold.
"""

from __future__ import annotations

import warnings
from copy import deepcopy

from tqdm import tqdm

from benchmarks.timing import machine
from extract.command import run
from extract.devices import choose_device
from train.config import TrainSettings
from train.data import ActivationPairs, heldout_batches
from train.engine import Engine
from train.stream import BatchStream
from train.world import World

FORMS = ("sparse", "readable")
FIRST_STEPS = 100


def main(settings: TrainSettings) -> None:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    crosscoder, training = settings.crosscoder, settings.training
    pairs = ActivationPairs.open(settings)
    stream = BatchStream(pairs, settings.seed, training.num_tokens_per_step, settings.data)
    engines = [_engine(settings, form, pairs) for form in FORMS]
    for engine in engines:
        engine.initialise(stream.batch(0))
    differences = []
    for step in tqdm(range(training.num_steps), disable=None):
        raw_BMD = stream.batch(step)
        measured = step < FIRST_STEPS or step + 1 == training.num_steps
        fast, slow = (engine.step(raw_BMD, measured) for engine in engines)
        if measured:
            differences.append(abs(fast["train/loss"] - slow["train/loss"]) / slow["train/loss"])
    print(machine())
    print(
        f"quality: {training.num_steps} steps of {training.num_tokens_per_step} tokens, L={crosscoder.num_latents} "
        f"k={crosscoder.k}, {training.precision}: loss differs by {max(differences[:FIRST_STEPS]):.1e} at most over "
        f"the first {FIRST_STEPS} steps, by {differences[-1]:.1e} in the last"
    )
    for form, engine in zip(FORMS, engines, strict=True):
        metrics = engine.evaluate(
            heldout_batches(pairs, training.num_tokens_per_step, settings.data.max_validation_tokens)
        )
        values = ", ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())
        print(f"  {form}: held out {values}")


def _engine(settings: TrainSettings, form: str, pairs: ActivationPairs) -> Engine:
    settings = deepcopy(settings)
    settings.training.step = form
    world = World.alone(choose_device(settings.training.device, "training.device"))
    return Engine(settings, pairs.models, pairs.d_model, pairs.activation_mean, pairs.activation_scale, world)


if __name__ == "__main__":
    run(TrainSettings, main)
