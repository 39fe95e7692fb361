"""Latents divided among ranks: engine=latent.

R ranks, engine.ranks_per_copy of them or all, hold one copy of the weights: each the rows of some latents, of W_enc,
b_enc and W_dec with their gradients and moments, and all of b_dec. A rank computes codes and partial reconstructions of
its own latents for the tokens of all R, so that tokens cross ranks and weights do not. Each rank sends in a step, times
(R - 1) / R, for the B tokens that its R ranks read:

    x                 B M D    gathered, in the dtype in which it is stored
    recons            B M D    partial sums, to the ranks that read the tokens
    their gradient    B M D    gathered

and the last two again for AuxK's reconstruction of the error while a latent is dead. The counts of the selection do not
grow with B, those of AuxK's (`train.row_cut`) not with M D. Ranks that hold the same latents, one in each of C = W / R
copies, sum the gradients of their rows of W_enc and W_dec: 4 (L / R) M D, times (C - 1) / C.

Shapes: B tokens, M models, D width, W = M * D, L latents, l of this rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from extract.errors import BadInput
from train.config import TrainSettings
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.pieces import Piece, SavedState
from train.placement import Share, Space
from train.ranks import Group
from train.single import LocalWeights
from train.world import World

ROWS = ("W_enc", "b_enc", "W_dec")  # weights with a row for each latent
BLOCK_SIZE = 1 << 24  # numbers of a weight that ranks send at once when they put it together


class DividedLatents:
    """The placement of engine=latent: `LocalWeights` of this rank's latents, and what passes between ranks."""

    def __init__(self, settings: TrainSettings, space: Space, world: World):
        """BadInput where ranks_per_copy does not divide the ranks, or there are more ranks to a copy than latents."""
        num_latents = settings.crosscoder.num_latents
        within, across = world.split(settings.engine.ranks_per_copy or world.everyone.size)
        if num_latents < within.size:
            raise BadInput(
                f"crosscoder.num_latents={num_latents} cannot be divided among {within.size} ranks. Use "
                f"engine.ranks_per_copy={num_latents} or less, or at least {within.size} latents."
            )
        latents = latents_of(num_latents, within.rank, within.size)
        share = Share(num_latents, latents.start, world.everyone, latents=within, tokens=across)
        crosscoder = space.crosscoder(settings.crosscoder, world.device, latents)
        self._local = LocalWeights(crosscoder, settings.training, share)
        self.share, self.crosscoder, self.gradients = share, crosscoder, self._local.gradients

    def whole(self, exact: bool = False) -> AbstractContextManager[Operands]:
        return self._local.whole(exact)

    def backward(self, loss: Tensor) -> None:
        self._local.backward(loss)

    def reduce(self) -> Tensor:
        gradients, share = self._local.named_gradients(), self.share
        for name in ROWS:
            share.tokens.sum(gradients[name], "gradients")
        self.crosscoder.zero_foreign_rows(gradients["W_enc"], gradients["W_dec"])
        share.everyone.sum(gradients["b_dec"], "gradient of the decoder bias")
        norm = torch.nn.utils.get_total_norm([gradients[name] for name in ROWS])
        norms_R = share.latents.gather(norm[None], "norm of the gradient")
        return torch.nn.utils.get_total_norm([norms_R, gradients["b_dec"]])

    def update(self, number: int, learning_rate: float, grad_norm: Tensor, skip: Tensor) -> None:
        self._local.update(number, learning_rate, grad_norm, skip)

    def initialise(self, x_BMD: Tensor, seed: int) -> None:
        self._local.initialise(x_BMD, seed)

    def pieces(self) -> dict[str, Piece]:
        return self._local.pieces()

    def load(self, saved: SavedState) -> None:
        self._local.load(saved)

    def whole_crosscoder(self) -> Crosscoder | None:
        if self.share.tokens.rank > 0:
            return None
        group, part = self.share.latents, self.crosscoder
        whole = Crosscoder(part.config, part.models, part.d_model, part.hookpoint) if group.rank == 0 else None
        for name in ROWS:
            into = None if whole is None else whole.get_parameter(name).detach()
            gather_rows(part.get_parameter(name).detach(), into, self.share.num_latents, group)
        if whole is not None:
            shared = ("b_dec", "activation_mean", "activation_scale")
            whole.load_state_dict({name: part.state_dict()[name] for name in shared}, strict=False)
        return whole


def latents_of(num_latents: int, rank: int, num_ranks: int) -> range:
    """The latents of a rank: consecutive, and of no rank more than one more than of another."""
    return range(num_latents * rank // num_ranks, num_latents * (rank + 1) // num_ranks)


def gather_rows(part: Tensor, into: Tensor | None, num_rows: int, group: Group) -> None:
    """Put together the (num_rows, ...) of which each rank has the rows of `latents_of`, in `into`, of the first rank.

    Block by block, so that no GPU ever holds more than a block of each rank.
    """
    most, row_size = -(-num_rows // group.size), max(1, part[0].numel())
    block_rows = max(1, BLOCK_SIZE // row_size)
    for start in range(0, most, block_rows):
        block = part.new_zeros(min(block_rows, most - start), *part.shape[1:])  # of equal size on all ranks
        own = part[start : start + len(block)]
        block[: len(own)] = own
        blocks = group.gather(block, "rows of the crosscoder").split(len(block))
        if into is not None:
            for rank, rows in enumerate(blocks):
                latents = latents_of(num_rows, rank, group.size)
                first, stop = latents.start + start, min(latents.start + start + len(block), latents.stop)
                into[first:stop] = rows[: stop - first]
