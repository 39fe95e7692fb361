"""One shard of documents through a model: batches of similar lengths, rows copied to the host beside the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from extract.models import CutModel

# What one more forward pass costs, as a share of the token budget, beside its tokens: the smaller, the less padding.
PASS_COST = 1 / 64


@dataclass
class ShardActivations:
    """Activations of one shard, its documents one after the other: `rows` (T, D) of every hookpoint, on the host.

    On a GPU the last copies may still be on their way: `wait` before reading. `computed_tokens` counts padding too.
    """

    rows: dict[str, Tensor]
    lengths: list[int]
    computed_tokens: int
    copies: list[torch.cuda.Event]

    def wait(self) -> None:
        for event in self.copies:
            event.synchronize()

    def documents(self, hookpoint: str) -> Iterator[Tensor]:
        """(N, D) of each document in order, views of the rows."""
        return iter(self.rows[hookpoint].split(self.lengths))


class HostRows:
    """Where the rows of a shard arrive. From a GPU they are copied into pinned memory on a stream of their own, beside
    the forward pass of the next batch.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.rows: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, hookpoint: str, acts_BND: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Document b of the batch has `lengths[b]` tokens, the first of them row `starts[b]`; the rest is padding."""
        if hookpoint not in self.rows:
            shape = (self.num_tokens, acts_BND.shape[-1])
            self.rows[hookpoint] = torch.empty(shape, dtype=acts_BND.dtype, pin_memory=acts_BND.is_cuda)
        if not acts_BND.is_cuda:
            self._copy(hookpoint, acts_BND, starts, lengths)
            return
        stream = self._streams.setdefault(acts_BND.device, torch.cuda.Stream(acts_BND.device))
        stream.wait_stream(torch.cuda.current_stream(acts_BND.device))
        with torch.cuda.stream(stream):
            self._copy(hookpoint, acts_BND, starts, lengths)
        acts_BND.record_stream(stream)  # or its memory is reused while it is still being copied

    def _copy(self, hookpoint: str, acts_BND: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
        for acts_ND, start, length in zip(acts_BND, starts, lengths, strict=True):
            self.rows[hookpoint][start : start + length].copy_(acts_ND[:length], non_blocking=True)

    def copies(self) -> list[torch.cuda.Event]:
        """Events that have happened once everything added so far has arrived."""
        return [stream.record_event() for stream in self._streams.values()]


def compute_shard(
    model: CutModel, documents: Sequence[np.ndarray], batch_tokens: int, progress: Callable[[int], object]
) -> ShardActivations:
    """The activations of the documents, given as token ids; `progress` is told the tokens of every batch."""
    lengths = np.array([len(token_ids) for token_ids in documents])
    starts = lengths.cumsum() - lengths
    rows, computed = HostRows(int(lengths.sum())), 0
    for batch in length_batches(lengths, batch_tokens):
        token_ids_BN, mask_BN = padded([documents[i] for i in batch])
        for hookpoint, acts_BND in model.activations(token_ids_BN, mask_BN).items():
            rows.add(hookpoint, acts_BND, starts[batch].tolist(), lengths[batch].tolist())
        computed += token_ids_BN.numel()
        progress(int(lengths[batch].sum()))
    return ShardActivations(rows.rows, lengths.tolist(), computed, rows.copies())


def padded(documents: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token ids (B, N) and mask (B, N) of a batch, documents padded at the right to the longest."""
    lengths = [len(token_ids) for token_ids in documents]
    token_ids_BN = torch.zeros(len(documents), max(lengths), dtype=torch.long)
    mask_BN = torch.zeros_like(token_ids_BN)
    for row, token_ids in enumerate(documents):
        token_ids_BN[row, : lengths[row]] = torch.from_numpy(token_ids.astype(np.int64))
        mask_BN[row, : lengths[row]] = 1
    return token_ids_BN, mask_BN


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Documents in batches of at most `batch_tokens` tokens, padding included; a longer document comes alone.

    Sorted longest first, l_1 >= l_2 >= ..., consecutive documents i ... j - 1 cost (j - i) * l_i tokens in a batch. The
    split with the smallest sum of costs, with PASS_COST * batch_tokens for every batch, is found from the end:
    best(i) = min over j of cost(i, j) + best(j). A pure function of its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = _best_sizes(lengths[order].astype(np.int64), batch_tokens)
    start = 0
    while start < len(order):
        yield order[start : start + sizes[start]]
        start += sizes[start]


def _best_sizes(descending: np.ndarray, batch_tokens: int) -> list[int]:
    """How many documents the best batch that begins with document i takes, for every i."""
    num = len(descending)
    best, taken = np.zeros(num + 1), [0] * num
    for i in range(num - 1, -1, -1):
        longest = int(descending[i])
        sizes = np.arange(1, min(num - i, max(1, batch_tokens // longest)) + 1)
        costs = sizes * longest + PASS_COST * batch_tokens + best[i + sizes]
        taken[i] = int(sizes[costs.argmin()])
        best[i] = costs.min()
    return taken
