"""Near misses: documents in which a latent does not fire, and comes nearer to it than in those that are kept already.

They are found in chunks of the encoder's product, which exist for a moment only.

Shapes: B tokens, L latents, C latents of a chunk, d documents of a batch, c candidates, (document, latent) pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from analysis.firings.firings import DocumentFirings
from analysis.firings.reading import TokenBatch


class NearMisses:
    """The candidates of one batch after another: the largest pre-activation of each document, and where it is.

    `scale_L` and `threshold` are those of `train.inference.inference_codes`.
    """

    def __init__(self, scale_L: Tensor, threshold: float):
        self._scale_L, self._threshold = scale_L, max(threshold, 0.0)
        self._floor_L = scale_L
        self._document_d, self._length_d = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._parts: list[tuple[Tensor, ...]] = []

    def begin(self, batch: TokenBatch, floor_L: np.ndarray) -> None:
        """A new batch; pre-activations below `floor_L` are not looked for."""
        self._floor_L = torch.from_numpy(floor_L).to(self._scale_L)
        self._document_d, self._length_d = np.unique(batch.document_B, return_counts=True)
        self._parts = []

    def watch(self, first: int, pre_BC: Tensor) -> None:
        """See `train.inference.inference_codes`."""
        latents = slice(first, first + pre_BC.shape[1])
        each = pre_BC.split(self._length_d.tolist())
        best_dC = torch.stack([pre_BC.amax(0) for pre_BC in each])
        # Where the largest product with s >= 0 is not above the threshold, none is: the latent does not fire.
        is_near_dC = (best_dC >= self._floor_L[latents]) & ~(best_dC * self._scale_L[latents] > self._threshold)
        row_c, column_c = is_near_dC.nonzero(as_tuple=True)
        columns = column_c.split(torch.bincount(row_c, minlength=len(each)).tolist())
        # Positions are sought for candidates alone, which are few: finding them takes longer than the maxima.
        index_c = torch.cat([pre.index_select(1, column).argmax(0) for pre, column in zip(each, columns, strict=True)])
        self._parts.append((row_c, column_c + first, index_c, best_dC[row_c, column_c]))

    def found(self, batch: TokenBatch) -> DocumentFirings:
        """All candidates of the batch, each with its one token."""
        row_c, latent_c, index_c, value_c = (torch.cat(part).cpu().numpy() for part in zip(*self._parts, strict=True))
        start_d = self._length_d.cumsum() - self._length_d
        position_c = batch.position_B[start_d[row_c] + index_c]
        return DocumentFirings.adjacent(latent_c, self._document_d[row_c], position_c, value_c)
