"""The tokens of a step on one rank, in micro-batches that are differentiated one after another.

Where ranks divide the latents, each works on the tokens of all of them: micro-batch j is then the j-th part of each
rank's tokens, in the order of ranks.

Shapes: b tokens that this rank read, R ranks that divide the latents, n micro-batches, m = b / n; M models, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from extract.errors import BadInput
from train.crosscoder import Crosscoder
from train.placement import Share


class MicroBatches:
    """`len` micro-batches of `rows` = R * m tokens, of which this rank read m; all ranks have equally many.

    Attributes:
        token_B: number of each row (n * R * m,), micro-batches one after another, among the tokens of all ranks; None
            where it is the number of the row.
        num_tokens: of all ranks.
    """

    def __init__(self, crosscoder: Crosscoder, share: Share, x_bMD: Tensor, token_b: Tensor | None, number: int):
        if not x_bMD.is_floating_point():
            raise BadInput(
                f"Activations are {x_bMD.dtype}, and an engine takes floating numbers: decode coded activations first."
            )
        if len(x_bMD) % number:
            raise BadInput(
                f"training.num_micro_steps={number} does not divide the {len(x_bMD)} tokens of a rank. "
                "Give a divisor of them."
            )
        assert token_b is not None or share.everyone.size == 1, "Ranks tell the numbers of their tokens."
        self._crosscoder, self._share, self._number = crosscoder, share, number
        self._x_RbMD = self._of_all(x_bMD, "tokens")
        self.rows = self._x_RbMD.shape[0] * len(x_bMD) // number
        self.num_tokens = len(x_bMD) * share.everyone.size
        self.token_B = None if token_b is None else self._in_order(self._of_all(token_b, "numbers of tokens"))
        self._last: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._number

    def scaled(self, number: int) -> Tensor:
        """Micro-batch `number` (R * m, M, D), scaled. The last one asked for is kept, so a single one is made once."""
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = number, self._crosscoder.scale(self._part(self._x_RbMD, number).flatten(0, 1))
        return self._last[1]

    def own(self, number: int) -> Tensor:
        """The tokens (m, M, D) that this rank read of micro-batch `number`, scaled."""
        group = self._share.latents
        return self.scaled(number).unflatten(0, (group.size, -1))[group.rank]

    def _of_all(self, own: Tensor, what: str) -> Tensor:
        """The tensors of the ranks that divide the latents, (R, b, ...)."""
        group = self._share.latents
        return group.gather(own, what).unflatten(0, (group.size, -1)) if group.size > 1 else own[None]

    def _part(self, whole: Tensor, number: int) -> Tensor:
        """Of (R, b, ...) the part (R, m, ...) of one micro-batch."""
        size = whole.shape[1] // self._number
        return whole[:, number * size : (number + 1) * size]

    def _in_order(self, whole: Tensor) -> Tensor:
        """(R, b) to (n * R * m,), micro-batches one after another."""
        return torch.cat([self._part(whole, number).flatten() for number in range(self._number)])
