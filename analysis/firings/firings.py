"""Which latents fire where: the codes of a batch in the order that sums want, and by document.

Shapes: B tokens, L latents, n firing (token, latent) pairs; u rows, the (group of documents, latent) pairs among them;
g (latent, document) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.batch_topk import Selection

NO_TOKENS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Codes:
    """The nonzero codes (n,) of a batch, sorted by row, then token; row = group * num_latents + latent.

    `row_u` are the rows that occur, ascending; those of row u are `start_u1[u]` to `start_u1[u + 1]`.
    """

    num_latents: int
    row_n: Tensor
    token_n: Tensor
    value_n: Tensor
    row_u: Tensor
    start_u1: Tensor

    @classmethod
    def of(cls, selection: Selection, code_S: Tensor, group_B: Tensor, num_latents: int) -> Codes:
        """Codes sorted by token; `group_B` is the group of each token."""
        row_S = group_B[selection.token] * num_latents + selection.latent
        # 32 bits sort twice as fast; `check_groups` sees to it that they suffice.
        row_n, order_n = row_S.int().sort(stable=True)
        row_u, count_u = torch.unique_consecutive(row_n, return_counts=True)
        start_u1 = torch.nn.functional.pad(count_u.cumsum(0), (1, 0))
        return cls(num_latents, row_n, selection.token[order_n], code_S[order_n], row_u.long(), start_u1)

    @classmethod
    def from_dense(cls, acts_BL: Tensor, group_B: Tensor | None = None) -> Codes:
        """The nonzero entries of (B, L) codes, by default of one group."""
        token_S, latent_S = acts_BL.nonzero(as_tuple=True)
        group_B = token_S.new_zeros(len(acts_BL)) if group_B is None else group_B
        return cls.of(Selection(token_S, latent_S), acts_BL[token_S, latent_S], group_B, acts_BL.shape[1])

    @property
    def latent_u(self) -> Tensor:
        return self.row_u % self.num_latents


@dataclass(frozen=True)
class DocumentFirings:
    """What latents do in documents: the maximum (g,), and positions and values (n,) of the `length_g` firing tokens."""

    latent_g: np.ndarray
    document_g: np.ndarray
    maximum_g: np.ndarray
    length_g: np.ndarray
    position_n: np.ndarray
    value_n: np.ndarray

    @classmethod
    def of(cls, codes: Codes, document_B: np.ndarray, position_B: np.ndarray) -> DocumentFirings:
        """Those of a batch of whole documents, each of one group."""
        token_n = codes.token_n.cpu().numpy()
        latent_n = codes.row_n.cpu().numpy() % codes.num_latents
        return cls.adjacent(latent_n, document_B[token_n], position_B[token_n], codes.value_n.cpu().numpy())

    @classmethod
    def group(
        cls, document_n: np.ndarray, position_n: np.ndarray, latent_n: np.ndarray, value_n: np.ndarray
    ) -> DocumentFirings:
        """Groups firing tokens (in order of position within a document) of whole documents by latent, then document."""
        order_n = np.lexsort((document_n, latent_n))
        return cls.adjacent(*(column[order_n] for column in (latent_n, document_n, position_n, value_n)))

    @classmethod
    def adjacent(
        cls, latent_n: np.ndarray, document_n: np.ndarray, position_n: np.ndarray, value_n: np.ndarray
    ) -> DocumentFirings:
        """Of firing tokens of which those of one latent and document stand together, in order of position."""
        changes = (np.diff(latent_n) != 0) | (np.diff(document_n) != 0)
        start_g = np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(latent_n)]
        length_g = np.diff(np.append(start_g, len(latent_n))).astype(np.int32)
        maximum_g = np.maximum.reduceat(value_n, start_g) if len(start_g) else value_n
        columns = (latent_n[start_g].astype(np.int32), document_n[start_g].astype(np.int32), maximum_g, length_g)
        return cls(*columns, position_n.astype(np.int32), value_n)

    @classmethod
    def silent(cls, latent_g: np.ndarray, document_g: np.ndarray, maximum_g: np.ndarray) -> DocumentFirings:
        """Documents in which no token fires, with what counts as their maximum."""
        latent_g, document_g = latent_g.astype(np.int32), document_g.astype(np.int32)
        length_g = np.zeros(len(latent_g), dtype=np.int32)
        return cls(latent_g, document_g, maximum_g, length_g, NO_TOKENS, maximum_g[:0])

    @classmethod
    def concatenate(cls, parts: list[DocumentFirings]) -> DocumentFirings:
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part.arrays() for part in parts), strict=True)))

    def select(self, index_g: np.ndarray) -> DocumentFirings:
        """The groups that a mask or an index picks, with their tokens."""
        lengths = self.length_g.astype(np.int64)
        start_g, length_g = (lengths.cumsum() - lengths)[index_g], lengths[index_g]
        shift_g = start_g - (length_g.cumsum() - length_g)
        index_n = np.repeat(shift_g, length_g) + np.arange(length_g.sum())
        groups = (self.latent_g[index_g], self.document_g[index_g], self.maximum_g[index_g], self.length_g[index_g])
        return DocumentFirings(*groups, self.position_n[index_n], self.value_n[index_n])

    def where(self, mask_g: np.ndarray) -> DocumentFirings:
        """The groups of a mask; no copy where these are all."""
        return self if mask_g.all() else self.select(mask_g)

    @property
    def peak_g(self) -> np.ndarray:
        """The position of the strongest token of each group, the first of several, -1 where none fires."""
        peak_g = np.full(len(self.length_g), -1, dtype=np.int32)
        group_n = np.repeat(np.arange(len(self.length_g)), self.length_g)
        strongest = np.flatnonzero(self.value_n == self.maximum_g[group_n])[::-1]
        peak_g[group_n[strongest]] = self.position_n[strongest]  # of several values the last one stays
        return peak_g

    def parts(self, size: int) -> Iterator[tuple[slice, DocumentFirings]]:
        """All groups in their order, `size` at a time, without copies: which they are, and they."""
        end_g = self.length_g.cumsum(dtype=np.int64)
        for first in range(0, len(end_g), size):
            groups = slice(first, first + size)
            tokens = slice(end_g[first] - self.length_g[first], end_g[groups][-1])
            columns = (self.latent_g[groups], self.document_g[groups], self.maximum_g[groups], self.length_g[groups])
            yield groups, DocumentFirings(*columns, self.position_n[tokens], self.value_n[tokens])

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.latent_g, self.document_g, self.maximum_g, self.length_g, self.position_n, self.value_n
