"""Who computes a step: the protocol, and one process, the reference that every other engine must equal.

"Batch" is the batch of all ranks: k * B codes survive in it, its smallest selected code feeds the threshold, its tokens
advance the counters of silent latents, and its gradient has one norm. Shapes: B tokens, M models, D width, L latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from extract.devices import choose_device
from train.config import TrainingConfig, TrainSettings
from train.crosscoder import Crosscoder
from train.initialisation import initialise
from train.losses import Forward, readable_forward, training_losses
from train.metrics import step_metrics, validation_metrics
from train.sparse import sparse_forward

FORWARDS = {"readable": readable_forward, "sparse": sparse_forward}


@dataclass
class TrainingState:
    """Everything that the next step depends on: tensors by name, and plain values that JSON holds exactly."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Engine(Protocol):
    """What the trainer asks of an engine. Batches are raw activations (B, M, D)."""

    steps_done: int

    def initialise(self, x_BMD: Tensor) -> None:
        """Draw the initial weights, from the seed and the first batch."""

    def step(self, x_BMD: Tensor, measured: bool = True) -> dict[str, float]:
        """One update; its metrics if `measured`, which changes nothing else.

        FloatingPointError, before anything changes, when loss or gradient is not finite.
        """

    def evaluate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Validation metrics; changes nothing."""

    def state(self) -> TrainingState:
        """The whole training state, to be saved before the next step."""

    def load_state(self, state: TrainingState) -> None:
        """Continue from a saved state."""

    def save_crosscoder(self, folder: Path, trained_with: dict[str, Any]) -> None:
        """Publish the weights for analysis, with the settings and data that led to them."""


class SingleEngine:
    """One process, on one device."""

    def __init__(
        self,
        settings: TrainSettings,
        models: list[str],
        d_model: int,
        activation_mean: Tensor,
        activation_scale: Tensor,
    ):
        self._training, self._seed = settings.training, settings.seed
        self._forward = FORWARDS[settings.training.step]
        self._device = choose_device(settings.training.device, "training.device")
        self.crosscoder = Crosscoder(settings.crosscoder, models, d_model, settings.hookpoint)
        self.crosscoder.activation_mean.copy_(activation_mean)
        self.crosscoder.activation_scale.copy_(activation_scale)
        self.crosscoder.to(self._device)
        first, second = settings.training.adam_betas
        self._optimizer = torch.optim.Adam(
            self.crosscoder.parameters(), lr=self._training.lr, betas=(first, second), fused=True
        )
        self.steps_done = 0
        self.silent_tokens_L = torch.zeros(settings.crosscoder.num_latents, dtype=torch.int64, device=self._device)

    def initialise(self, x_BMD: Tensor) -> None:
        initialise(self.crosscoder, self.crosscoder.scale(x_BMD.to(self._device)), self._seed)

    def step(self, x_BMD: Tensor, measured: bool = True) -> dict[str, float]:
        config = self.crosscoder.config
        x_BMD = self.crosscoder.scale(x_BMD.to(self._device))
        dead_L = self.silent_tokens_L >= config.dead_after_tokens
        forward = self._forward(self.crosscoder, x_BMD, config.k * len(x_BMD), dead_L)
        losses = training_losses(config, x_BMD, forward)
        metrics = step_metrics(self.crosscoder, x_BMD, forward, losses) if measured else {}
        learning_rate = self._training.lr * learning_rate_factor(self._training, self.steps_done)
        grad_norm = self._update(losses.total, learning_rate)
        self._count(forward, len(x_BMD))
        threshold = {} if self.crosscoder.threshold is None else {"train/threshold": self.crosscoder.threshold}
        return {
            **metrics,
            **threshold,
            "train/dead": int(dead_L.sum()),
            "train/grad_norm": grad_norm,
            "train/lr": learning_rate,
        }

    def evaluate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        return validation_metrics(self.crosscoder, batches)

    def state(self) -> TrainingState:
        tensors = {f"crosscoder.{name}": tensor for name, tensor in self.crosscoder.state_dict().items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        tensors["silent_tokens"] = self.silent_tokens_L
        return TrainingState(tensors, {"steps_done": self.steps_done, "threshold": self.crosscoder.threshold})

    def load_state(self, state: TrainingState) -> None:
        self.crosscoder.load_state_dict(_below("crosscoder.", state.tensors))
        adam = self._optimizer.state_dict()
        adam["state"] = {}
        for name, tensor in _below("adam.", state.tensors).items():
            index, _, moment = name.partition(".")
            adam["state"].setdefault(int(index), {})[moment] = tensor
        self._optimizer.load_state_dict(adam)
        self.silent_tokens_L.copy_(state.tensors["silent_tokens"])
        self.steps_done, self.crosscoder.threshold = state.values["steps_done"], state.values["threshold"]

    def save_crosscoder(self, folder: Path, trained_with: dict[str, Any]) -> None:
        self.crosscoder.trained_with = trained_with
        self.crosscoder.save(folder)

    def _update(self, loss: Tensor, learning_rate: float) -> float:
        """One step of Adam under the global gradient clip; the norm before clipping."""
        self._optimizer.zero_grad()
        loss.backward()
        parameters = list(self.crosscoder.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for weight in (self.crosscoder.W_enc, self.crosscoder.W_dec):
            assert weight.grad is not None
            self.crosscoder.zero_foreign_rows(weight.grad)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"The loss is {loss.item():g} and its gradient's norm {norm.item():g}.")
        if norm > self._training.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._training.max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return norm.item()

    @torch.no_grad()
    def _count(self, forward: Forward, num_tokens: int) -> None:
        """Advance the clocks: silent tokens of each latent, the threshold, the step."""
        self.silent_tokens_L += num_tokens
        self.silent_tokens_L[forward.selection.latent] = 0
        config = self.crosscoder.config
        if self.steps_done >= config.threshold_start_step and len(forward.score_S):
            smallest, before = forward.score_S.min().item(), self.crosscoder.threshold
            decay = config.threshold_decay
            self.crosscoder.threshold = smallest if before is None else decay * before + (1 - decay) * smallest
        self.steps_done += 1


ENGINES = {"single": SingleEngine}


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the peak learning rate in step `step` of T, counted from 0: min(1, (step + 1) / warmup_steps), times
    (T - step) / (decay_fraction * T) over the last `decay_fraction` of the steps, so that step T would have rate zero.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * config.num_steps
    decay = min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * decay


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
