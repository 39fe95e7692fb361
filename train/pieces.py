"""The training state cut into rows: what each rank has of every tensor, and the whole as any other ranks read it.

Names and values do not depend on the engine that held them: what one saves, every other loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Sliceable(Protocol):
    """Rows that are read when a range of them is asked for: a tensor, or a slice of a safetensors file."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + len(rows)), along dimension 0, of a tensor of `num_rows` rows; there may be none."""

    rows: Tensor
    first: int
    num_rows: int

    @property
    def stop(self) -> int:
        return self.first + len(self.rows)

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        """All rows of a tensor; of a single number, one row."""
        rows = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
        return cls(rows, 0, len(rows))


@dataclass(frozen=True)
class TrainingState:
    """What one rank has of everything that the next step depends on: tensors by name, and plain values that JSON holds.

    The pieces of all ranks cover every tensor once, and the values are the same on all of them. Pieces are views of
    what the next step changes.
    """

    tensors: dict[str, Piece]
    values: dict[str, Any]


@dataclass(frozen=True)
class Extent:
    """Rows [first, stop) of a tensor, and where to read them: `source[0]` is row `first`."""

    first: int
    stop: int
    source: Sliceable

    def overlaps(self, first: int, stop: int) -> bool:
        return max(self.first, first) < min(self.stop, stop)


class SavedState:
    """The state of all ranks, to be read row by row: nothing is read before it is asked for."""

    def __init__(self, extents: dict[str, list[Extent]], values: dict[str, Any]):
        """`extents` of each tensor as `covering` orders them."""
        self._extents, self.values = extents, values

    @classmethod
    def of(cls, states: Iterable[TrainingState]) -> SavedState:
        """The whole that the ranks' states make. The tensors are not copied."""
        extents: dict[str, list[Extent]] = {}
        num_rows: dict[str, int] = {}
        values: dict[str, Any] = {}
        for state in states:
            values = state.values
            for name, piece in state.tensors.items():
                num_rows[name] = piece.num_rows
                extents.setdefault(name, []).append(Extent(piece.first, piece.stop, piece.rows))
        return cls({name: covering(name, num_rows[name], parts) for name, parts in extents.items()}, values)

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._extents)

    def num_rows(self, name: str) -> int:
        """Rows of a whole tensor; KeyError, naming it, where there is none of this name."""
        return self._extents[name][-1].stop

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows [first, stop) of a tensor, by default all; on the CPU unless the state never left a device.

        To be copied, not written to: where one file holds all of them, this is its memory. IndexError for rows that the
        tensor does not have.
        """
        stop = self.num_rows(name) if stop is None else stop
        if not 0 <= first <= stop <= self.num_rows(name):
            raise IndexError(f"rows {first} to {stop} of {name}, which has {self.num_rows(name)}")
        if first == stop:
            return _part(self._extents[name][0], 0, 1)[:0]
        parts = [_part(extent, first, stop) for extent in self._extents[name] if extent.overlaps(first, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def covering(name: str, num_rows: int, extents: list[Extent]) -> list[Extent]:
    """The extents of a tensor of `num_rows` rows, in order. ValueError, naming it, unless they hold every row once."""
    check_covering(name, num_rows, [(extent.first, extent.stop) for extent in extents])
    return sorted((extent for extent in extents if extent.first < extent.stop), key=lambda extent: extent.first)


def check_covering(name: str, num_rows: int, ranges: Iterable[tuple[int, int]]) -> None:
    """ValueError, naming the tensor, unless the ranges [first, stop) hold each of its `num_rows` rows once."""
    ordered = sorted((first, stop) for first, stop in ranges if first < stop)
    if num_rows == 0 or [*(first for first, _ in ordered), num_rows] != [0, *(stop for _, stop in ordered)]:
        held = ", ".join(f"{first} to {stop}" for first, stop in ordered)
        raise ValueError(f"of the {num_rows} rows of {name} these are there, not each of them once: {held or 'none'}")


def _part(extent: Extent, first: int, stop: int) -> Tensor:
    return extent.source[max(first - extent.first, 0) : min(stop, extent.stop) - extent.first]
