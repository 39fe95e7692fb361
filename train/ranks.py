"""Ranks that work on something together, and the few collectives that training needs.

Every collective is called by all ranks of a group, in the same order, with tensors of equal shape, and says what it is
for: that name is what a hanging run reports. A group of one returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Watches over the time that is spent in a block, which the string names.
Watch = Callable[[str], AbstractContextManager[object]]
# torch 2.13 renamed both, and warns whoever calls them by the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_sum_parts = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """`size` ranks, this one being number `rank` of them."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    watch: Watch = nullcontext

    def sum(self, values: Tensor, what: str) -> Tensor:
        """The sum over ranks, in place; the same bits on all of them."""
        return self._reduce(values, dist.ReduceOp.SUM, what)

    def min(self, values: Tensor, what: str) -> Tensor:
        """The smallest over ranks, in place."""
        return self._reduce(values, dist.ReduceOp.MIN, what)

    def gather(self, part: Tensor, what: str, whole: Tensor | None = None) -> Tensor:
        """The parts (n, ...) of all ranks as (size * n, ...), in the order of ranks. `whole` is memory for them, of
        which `part` is this rank's place.
        """
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * len(part), *part.shape[1:]) if whole is None else whole
        with self.watch(what):
            all_gather(whole, part.contiguous(), group=self.process_group)
        return whole

    def sum_parts(self, whole: Tensor, what: str) -> Tensor:
        """This rank's part (n, ...) of the sum over ranks of (size * n, ...)."""
        if self.size == 1:
            return whole
        part = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        with self.watch(what):
            _sum_parts(part, whole.contiguous(), group=self.process_group)
        return part

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        if self.size > 1:
            with self.watch(what):
                dist.all_reduce(values, operation, group=self.process_group)
        return values


class Parts(torch.autograd.Function):
    """Tokens' partial sums (size * n, ...), one from each rank of a group, to the sums of this rank's tokens (n, ...).

    The gradient of a sum is that of each of its terms: backward gathers the gradients of all ranks' tokens.
    """

    @staticmethod
    def forward(ctx, whole: Tensor, group: Group, what: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group, ctx.what = group, what
        return group.sum_parts(whole, what)

    @staticmethod
    def backward(ctx, grad_part: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return ctx.group.gather(grad_part, f"{ctx.what}, backward"), None, None
