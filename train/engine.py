"""A training run's state and its step, for any number of ranks; what engines differ in is a `train.placement`.

"Batch" is the batch of all ranks: k * B codes survive in it, its smallest selected code feeds the threshold, its tokens
advance the counters of silent latents, and its gradient has one norm. Every method is called by all ranks in the same
order, and what it decides is the same on all.

Shapes: B tokens of the batch, b of this rank, M models, D width, L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extract.errors import BadInput
from extract.metrics_file import Metrics
from train.clocks import Clocks, NotFinite
from train.config import TrainingConfig, TrainSettings
from train.crosscoder import Crosscoder
from train.encoder import CHUNK_BYTES, Operands
from train.forms import Form, ReadableForm, SparseForm, Task
from train.metrics import Batch, reconstructions, validation_metrics
from train.micro_batches import MicroBatches
from train.pieces import Piece, SavedState, TrainingState
from train.placement import Placement, Share, Space
from train.ranks import Group
from train.runs import hookpoint_of
from train.single import PRECISIONS, one_process
from train.step import Outcome, Step, differentiate
from train.world import World

# Measures by means of a function from raw activations of this rank to their reconstructions, with all ranks.
Recovered = Callable[[Callable[[Tensor], Tensor], Group], dict[str, float]]
# What of the crosscoder is neither trained nor a setting.
SCALING = ("activation_mean", "activation_scale")


class Engine:
    """Trains one crosscoder. Batches are raw activations (b, M, D) of this rank, on any device, and `token_b` (b,) the
    numbers of its tokens in the batch; None for one rank. On a GPU only measured steps make the host wait for it.
    """

    def __init__(
        self,
        settings: TrainSettings,
        models: list[str],
        d_model: int,
        activation_mean: Tensor,
        activation_scale: Tensor,
        world: World,
    ):
        self._training, self._seed, self._device = settings.training, settings.seed, _supported(world.device)
        space = Space(models, d_model, hookpoint_of(settings), activation_mean, activation_scale)
        self._placement = ENGINES[settings.engine.name](settings, space, world)
        num_latents = self.crosscoder.num_latents
        self._clocks = Clocks(settings.crosscoder, num_latents, self.share, self._device)
        self._deferred = self._device.type == "cuda"
        self.steps_done = 0

    @property
    def crosscoder(self) -> Crosscoder:
        """Of this rank's latents; its weights are those of `Placement.crosscoder`."""
        return self._placement.crosscoder

    @property
    def share(self) -> Share:
        return self._placement.share

    def initialise(self, x_bMD: Tensor, token_b: Tensor | None = None) -> None:
        """Draw the initial weights, from the seed and the first batch."""
        everyone = self.share.everyone
        x_BMD = everyone.gather(x_bMD.to(self._device), "the first batch")
        if token_b is not None:
            x_BMD = x_BMD[everyone.gather(token_b.to(self._device), "numbers of tokens").argsort()]
        self._placement.initialise(self.crosscoder.scale(x_BMD), self._seed)

    def step(self, x_bMD: Tensor, measured: bool = True, token_b: Tensor | None = None) -> dict[str, float]:
        """One update; its metrics, the same on all ranks, if `measured`, which changes nothing else.

        FloatingPointError, on all ranks, when score, loss or gradient is not finite: nothing of that step, nor of any
        after it, is kept, and `steps_done` is its number. On a GPU that is noticed when next a step is measured, or in
        `state`.
        """
        batches = self._batches(x_bMD, token_b)
        with self._placement.whole() as operands:
            outcome = self._differentiate(operands, batches, measured)
        grad_norm = self._placement.reduce()
        failed = self._clocks.judge(self.steps_done, outcome.losses_4[0], grad_norm, outcome.selected.finite)
        if measured or not self._deferred:
            self._raise_if_failed()
        learning_rate = self._training.lr * learning_rate_factor(self._training, self.steps_done)
        self._placement.update(self.steps_done + 1, learning_rate, grad_norm, failed)
        selection, score_S = outcome.selected.selection, outcome.selected.score_S
        self._clocks.advance(selection.latent, score_S, batches.num_tokens, self.steps_done, failed)
        self.steps_done += 1
        if not measured:
            return {}
        self.crosscoder.threshold = self._clocks.threshold
        return {
            **outcome.metrics(self.crosscoder.models, batches.num_tokens),
            **({} if self.crosscoder.threshold is None else {"train/threshold": self.crosscoder.threshold}),
            "train/grad_norm": grad_norm.item(),
            "train/lr": learning_rate,
        }

    def evaluate(self, batches: Iterable[Batch], recovered: Recovered | None = None) -> Metrics:
        """Validation metrics, the same on all ranks; changes nothing. Each batch is (activations, numbers of tokens),
        divided among the ranks of `share.tokens`; all ranks get equally many, maybe empty ones.

        With `recovered`, once there is a threshold, also its measures of the reconstruction by inference.
        """
        self.crosscoder.threshold = self._clocks.threshold
        with self._placement.whole(exact=True) as operands:
            metrics = validation_metrics(self.crosscoder, batches, operands, self.share)
            if recovered is not None and self.crosscoder.threshold is not None:
                metrics |= recovered(
                    lambda x_bMD: reconstructions(self.crosscoder, x_bMD, operands, self.share), self.share.everyone
                )
        return metrics

    def state(self) -> TrainingState:
        """This rank's part of the training state, to be copied before the next step."""
        self._raise_if_failed()
        pieces = self._placement.pieces() | self._clocks.pieces()
        if self.share.everyone.rank == 0:
            pieces |= {f"crosscoder.{name}": Piece.whole(getattr(self.crosscoder, name)) for name in SCALING}
        return TrainingState(pieces, {"steps_done": self.steps_done, **self._clocks.values()})

    def load_state(self, saved: SavedState) -> None:
        """Continue from a saved state, whatever engine and however many ranks it is from."""
        for name in SCALING:
            getattr(self.crosscoder, name).copy_(saved.rows(f"crosscoder.{name}"))
        self._placement.load(saved)
        self._clocks.load(saved)
        self.steps_done, self.crosscoder.threshold = saved.values["steps_done"], self._clocks.threshold

    def save_crosscoder(self, folder: Path, trained_with: dict[str, Any]) -> None:
        """Publish the weights for analysis, with the settings and data that led to them; rank 0 writes."""
        crosscoder = self._placement.whole_crosscoder()
        if crosscoder is not None:
            crosscoder.threshold, crosscoder.trained_with = self._clocks.threshold, trained_with
            crosscoder.save(folder)

    def _batches(self, x_bMD: Tensor, token_b: Tensor | None) -> MicroBatches:
        x_bMD = x_bMD.to(self._device, non_blocking=True)
        token_b = None if token_b is None else token_b.to(self._device, non_blocking=True)
        return MicroBatches(self.crosscoder, self.share, x_bMD, token_b, self._training.num_micro_steps)

    def _differentiate(self, operands: Operands, batches: MicroBatches, measured: bool) -> Outcome:
        candidate_Z = None
        if self.crosscoder.config.auxk_alpha > 0:
            candidate_Z = self._clocks.candidates(batches.num_tokens, exact=not self._deferred)
        task = Task(
            self.crosscoder,
            operands,
            self.share,
            batches,
            self.crosscoder.config.k * batches.num_tokens,
            self._clocks.dead(),
            self._clocks.any_dead(),
            candidate_Z,
            fixed_size=self._deferred,
        )
        form: Form = SparseForm(task, self._placement.gradients)
        if self._training.step == "readable":
            form = ReadableForm(task, PRECISIONS[self._training.precision])
        return differentiate(self._placement, Step(task, form, measured), len(batches))

    def _raise_if_failed(self) -> None:
        try:
            self._clocks.raise_if_failed()
        except NotFinite as error:
            self.steps_done = error.step
            raise


def _fully_sharded(settings: TrainSettings, space: Space, world: World) -> Placement:
    from train.fsdp import RowWeights

    return RowWeights(settings, space, world)


def _zero(settings: TrainSettings, space: Space, world: World) -> Placement:
    from train.zero import ZeroWeights

    return ZeroWeights(settings, space, world)


def _divided_latents(settings: TrainSettings, space: Space, world: World) -> Placement:
    from train.latent import DividedLatents

    return DividedLatents(settings, space, world)


# What makes the placement of each engine; another than one process is imported when it is asked for.
ENGINES: dict[str, Callable[[TrainSettings, Space, World], Placement]] = {
    "single": one_process,
    "fsdp": _fully_sharded,
    "deepspeed": _zero,
    "latent": _divided_latents,
}


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the peak learning rate in step `step` of T, counted from 0: min(1, (step + 1) / warmup_steps), times
    (T - step) / (decay_fraction * T) over the last `decay_fraction` of the steps, so that step T would have rate zero.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * config.num_steps
    decay = min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * decay


def _supported(device: torch.device) -> torch.device:
    if device.type not in CHUNK_BYTES:
        raise BadInput(f"training.device={device} is not supported: training runs on {' or '.join(CHUNK_BYTES)}.")
    return device
