"""All weights of a crosscoder, or of a part of its latents, as plain tensors of this process: engine=single.

Shapes: L latents held here, M models, D width, W = M * D.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.config import TrainingConfig, TrainSettings
from train.crosscoder import Crosscoder
from train.encoder import Copies, Operands
from train.initialisation import initialise
from train.optimiser import ClippedAdam, Written
from train.pieces import Piece, SavedState
from train.placement import Share, Space
from train.products import Gradients, kernels_for
from train.world import World

# The dtype of products, None where it is that of the weights.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def one_process(settings: TrainSettings, space: Space, world: World) -> LocalWeights:
    """The placement of engine=single."""
    crosscoder = space.crosscoder(settings.crosscoder, world.device)
    return LocalWeights(crosscoder, settings.training, Share(settings.crosscoder.num_latents, everyone=world.everyone))


class LocalWeights:
    """The placement where what lies here is all there is; where ranks hold parts, they add what passes between them."""

    def __init__(self, crosscoder: Crosscoder, training: TrainingConfig, share: Share):
        self.crosscoder, self.share = crosscoder, share
        self._copies = copies_of(crosscoder, training)
        self.gradients = _gradient_buffers(crosscoder) if training.step == "sparse" else None
        written = {
            "W_enc": Written(self._copies.operands.W_enc),
            "W_dec": Written(self._copies.operands.W_dec, self._copies.norms_LM),
        }
        self._adam = ClippedAdam(self.weights(), training.adam_betas, training.max_grad_norm, written)

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name: W_enc, b_enc, W_dec, b_dec."""
        return dict(self.crosscoder.named_parameters())

    @contextmanager
    def whole(self, exact: bool = False) -> Iterator[Operands]:
        if self.gradients is None:
            self.crosscoder.zero_grad()
        yield Operands.of(self.crosscoder) if exact else self._copies.operands

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self) -> Tensor:
        gradients = self.named_gradients()
        self.crosscoder.zero_foreign_rows(gradients["W_enc"], gradients["W_dec"])
        return torch.nn.utils.get_total_norm(gradients.values())

    def named_gradients(self) -> dict[str, Tensor]:
        """The gradients of this rank's share of the loss."""
        named = {name: weight.grad for name, weight in self.weights().items()}
        return {name: gradient for name, gradient in named.items() if gradient is not None}

    def update(self, number: int, learning_rate: float, grad_norm: Tensor, skip: Tensor) -> None:
        self._adam.step(self.named_gradients(), number, learning_rate, grad_norm, skip)
        if self._adam.writes:
            self._copies.refresh_small()
        else:
            self._copies.refresh()

    def initialise(self, x_BMD: Tensor, seed: int) -> None:
        initialise(self.crosscoder, x_BMD, seed)
        self._copies.refresh()

    def pieces(self) -> dict[str, Piece]:
        share = self.share
        givers = {True: share.everyone, False: share.tokens}  # one of the ranks that hold the same
        return {
            name: Piece(tensor, *self._extent(name))
            for name, tensor in self._tensors().items()
            if givers[_is_shared(name)].rank == 0
        }

    @torch.no_grad()
    def load(self, saved: SavedState) -> None:
        for name, tensor in self._tensors().items():
            first, _ = self._extent(name)
            tensor.copy_(saved.rows(name, first, first + len(tensor)))
        self._copies.refresh()

    def whole_crosscoder(self) -> Crosscoder | None:
        return self.crosscoder

    def _tensors(self) -> dict[str, Tensor]:
        """Weights and moments, as they are called in a state."""
        weights = {f"crosscoder.{name}": weight.detach() for name, weight in self.weights().items()}
        return weights | {f"adam.{name}": moment for name, moment in self._adam.moments().items()}

    def _extent(self, name: str) -> tuple[int, int]:
        """(first row, rows of the whole) of a tensor that has a row for each latent, or that all ranks hold."""
        if _is_shared(name):
            return 0, len(self.crosscoder.b_dec)
        return self.share.first_latent, self.share.num_latents


def _is_shared(name: str) -> bool:
    """Whether what belongs to this weight is the same for all latents."""
    return name.split(".")[1] == "b_dec"


def copies_of(crosscoder: Crosscoder, training: TrainingConfig) -> Copies:
    """What the products of a step read of whole weights, in the precision of the settings.

    Without kernels, narrow operands of the sparse products would gain nothing.
    """
    if training.step == "readable":
        return Copies(crosscoder)
    precision = PRECISIONS[training.precision]
    return Copies(crosscoder, precision, precision if kernels_for(crosscoder.W_dec) else None)


def _gradient_buffers(crosscoder: Crosscoder) -> Gradients:
    """The .grad of all weights, made once: fresh memory for each step costs a CPU more than what is written to it."""
    weights = crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec
    buffers = Gradients.like(*weights)
    for weight, gradient in zip(weights, buffers[:4], strict=True):
        weight.grad = gradient
    return buffers
