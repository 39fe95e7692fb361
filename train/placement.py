"""What engines differ in: which rank computes what, and where weights, gradients and Adam's moments lie.

Shapes: B tokens of the batch, b of this rank, M models, D width, W = M * D, L latents, l of this rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.pieces import Piece, SavedState
from train.products import Gradients
from train.ranks import Group


@dataclass(frozen=True)
class Share:
    """Who does what in a step. Each of `everyone` reads its own tokens of the batch and computes their loss.

    The ranks of `latents` divide the latents: they encode and decode the tokens of all of them together, each for its
    own latents, `first_latent` on, of `num_latents`. The ranks of `tokens` hold the same latents and differ in tokens.
    """

    num_latents: int
    first_latent: int = 0
    everyone: Group = field(default_factory=Group)
    latents: Group = field(default_factory=Group)
    tokens: Group = field(default_factory=Group)


@dataclass(frozen=True)
class Space:
    """What a crosscoder reads: `models` (index 0 = base), their width, where in them, and how they are scaled."""

    models: list[str]
    d_model: int
    hookpoint: str
    activation_mean: Tensor  # (M, D)
    activation_scale: Tensor  # (M,)

    def crosscoder(self, config: CrosscoderConfig, device: torch.device, latents: range | None = None) -> Crosscoder:
        """A crosscoder here with weights of zero, of all latents or a part of them."""
        crosscoder = Crosscoder(config, self.models, self.d_model, self.hookpoint, latents)
        crosscoder.activation_mean.copy_(self.activation_mean)
        crosscoder.activation_scale.copy_(self.activation_scale)
        return crosscoder.to(device)


class Placement(Protocol):
    """Weights, their gradients and Adam's moments, on one rank or over many. All methods are collective.

    A step is: within `whole`, for each micro-batch its graph and `backward`; then `reduce`; then `update`. Made by
    `Name(settings: TrainSettings, space: Space, world: World)`, see `train.engine.ENGINES`.
    """

    # Parameters W_enc, b_enc, W_dec, b_dec are of this rank's latents, and may be read within `whole` only. In a sparse
    # step they are leaves of the graph and no more: products read the operands. In a readable step they are what is
    # multiplied and differentiated, so in the dtype of the master weights. The gradient of b_dec is that of the tokens
    # of all ranks that divide the latents, on the first of them, and zero on the others.
    crosscoder: Crosscoder
    share: Share

    @property
    def gradients(self) -> Gradients | None:
        """Where the sparse step writes, or from the second micro-batch on adds, the gradients of the weights of
        `whole`; None where they go through autograd, into .grad or wherever `backward` takes them.
        """
        ...

    def whole(self, exact: bool = False) -> AbstractContextManager[Operands]:
        """While it is open, the weights of this rank's latents are plain tensors, and no gradient is left from before.

        Yields what products read: the weights in the precision of the settings, or with `exact`, as validation
        does, the master weights.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss for one micro-batch."""
        ...

    def reduce(self) -> Tensor:
        """Sum gradients over the ranks that share a weight, zero the foreign rows of dedicated latents; returns the
        norm () of the whole gradient, the same bits on all ranks. Called outside `whole`.
        """
        ...

    def update(self, number: int, learning_rate: float, grad_norm: Tensor, skip: Tensor) -> None:
        """Adam's update `number`, counted from 1, by the clipped gradients; nothing changes where `skip` (bool tensor,
        on the device, the same on all ranks) is true.
        """
        ...

    def initialise(self, x_BMD: Tensor, seed: int) -> None:
        """First weights from the first batch of all ranks, scaled (`train.initialisation`)."""
        ...

    def pieces(self) -> dict[str, Piece]:
        """This rank's pieces of the state: `crosscoder.W_enc`, ..., and for each weight `adam.W_enc.exp_avg` and
        `adam.W_enc.exp_avg_sq`. Every row comes from exactly one rank.
        """
        ...

    def load(self, saved: SavedState) -> None:
        """Take the rows of this rank from what `pieces` of any placement gave."""
        ...

    def whole_crosscoder(self) -> Crosscoder | None:
        """The crosscoder with all its weights, to be saved, on rank 0 of everyone; None elsewhere."""
        ...
