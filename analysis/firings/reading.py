"""A store's kept tokens in batches of whole documents, and the groups of documents that are resampled.

Shapes: B tokens of a batch, M models, D width, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from analysis.firings.token_kinds import TokenKinds
from train.data import ActivationPairs

# Kept tokens of a block: neighbouring documents that belong to one group.
BLOCK_TOKENS = 2048


@dataclass(frozen=True)
class TokenBatch:
    """Kept tokens of the documents `first` to `last`, last excluded: number of its document, position in it, group of
    documents and kind of each token (B,), and raw activations (B, M, D) as they are stored.
    """

    first: int
    last: int
    document_B: np.ndarray
    position_B: np.ndarray
    group_B: np.ndarray
    kind_B: np.ndarray
    x_BMD: Tensor


class Reading:
    """What is read in which order: batch i is a function of the store, `batch_tokens` and i.

    `group_n` (num_documents,) numbers the groups: blocks of neighbouring documents, about BLOCK_TOKENS long, are dealt
    to `num_groups` in turn. Documents that stand together may be alike (answers to one prompt, pages of one book), so
    they are resampled together, and a batch, which is a block where batches are of that size, belongs to one group.
    `is_first_n` marks the first document of each text.
    """

    def __init__(self, pairs: ActivationPairs, kinds: TokenKinds, batch_tokens: int, num_groups: int):
        self.pairs, self.kinds, self.num_groups = pairs, kinds, num_groups
        self.kept_n = pairs.kept.of_documents(pairs.tokens.row_starts)
        begin_n = self.kept_n.cumsum() - self.kept_n
        self.num_tokens = int(self.kept_n.sum())
        self.group_n = begin_n // max(1, min(BLOCK_TOKENS, self.num_tokens // num_groups)) % num_groups
        _, firsts = np.unique(begin_n // batch_tokens, return_index=True)
        self._bounds = np.append(firsts, len(begin_n))
        self._tokens_before = np.append(begin_n[firsts], self.num_tokens)

    @property
    def num_batches(self) -> int:
        return len(self._bounds) - 1

    def tokens_before(self, batch: int) -> int:
        """Kept tokens of all batches before this one."""
        return int(self._tokens_before[batch])

    @cached_property
    def is_first_n(self) -> np.ndarray:
        """(num_documents,) bool: no document before it has the same text."""
        is_first = np.zeros(len(self.kept_n), dtype=bool)
        is_first[np.unique(np.array(self.pairs.content), return_index=True)[1]] = True
        return is_first

    def batches(self, start: int) -> Iterator[TokenBatch]:
        """From batch `start` on; the next one is read by a thread while the caller works on this one."""
        # Torch works there in one thread: a second team would fight the caller's for the cores.
        with ThreadPoolExecutor(1, "reading", torch.set_num_threads, (1,)) as thread:
            coming = thread.submit(self._read, start) if start < self.num_batches else None
            for batch in range(start + 1, self.num_batches + 1):
                assert coming is not None
                found = coming.result()
                coming = thread.submit(self._read, batch) if batch < self.num_batches else None
                yield found

    def _read(self, batch: int) -> TokenBatch:
        first, last = self._bounds[batch : batch + 2].tolist()
        starts = self.pairs.tokens.row_starts
        row_B = starts[first] + np.flatnonzero(self.pairs.kept.mask[starts[first] : starts[last]])
        document_B = np.repeat(np.arange(first, last), self.kept_n[first:last])
        return TokenBatch(
            first,
            last,
            document_B,
            row_B - starts[document_B],
            self.group_n[document_B],
            self.kinds.kind_T[row_B],
            self.pairs.gather(row_B),
        )
