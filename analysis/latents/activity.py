"""How often, how strongly and where latents fire: counts over all kept tokens, in integers and float64.

Shapes: L latents, K kinds of tokens, S sources, n firing tokens of a batch, g (latent, document) pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from analysis.firings.firings import DocumentFirings
from analysis.firings.token_kinds import TEMPLATE, TokenKinds

# Bins of the histogram, powers of two; the first and the last also hold what lies beyond.
LOWEST, HIGHEST = -12, 12
NUM_BINS = HIGHEST - LOWEST


class Activity:
    """Counts by latent; work grows with the firing tokens only. All take 8 * L * (4 + NUM_BINS + K + S) bytes.

    num_active    (L,)           tokens on which the latent fires
    num_documents (L,)           documents in which it does
    sum_f, max_f  (L,)           float64
    histogram     (L, NUM_BINS)  of activations by their floor(log2)
    kinds         (L, K)         of firing tokens
    sources       (L, S)         of firing tokens, by the source of their document
    """

    def __init__(self, num_latents: int, kinds: TokenKinds):
        self._kinds = kinds
        self.num_tokens = 0
        self.num_active, self.num_documents = (np.zeros(num_latents, dtype=np.int64) for _ in range(2))
        self.sum_f, self.max_f = (np.zeros(num_latents) for _ in range(2))
        self.histogram = np.zeros((num_latents, NUM_BINS), dtype=np.int64)
        self.kinds = np.zeros((num_latents, kinds.num_kinds), dtype=np.int64)
        self.sources = np.zeros((num_latents, len(kinds.sources)), dtype=np.int64)

    def add(self, firings: DocumentFirings, kind_n: np.ndarray, num_tokens: int) -> None:
        """Adds a batch of `num_tokens` kept tokens; `kind_n` are the kinds of the firing ones."""
        self.num_tokens += num_tokens
        latent_g, length_g = firings.latent_g, firings.length_g
        latent_n = np.repeat(latent_g, length_g)
        np.add.at(self.num_active, latent_g, length_g.astype(np.int64))
        np.add.at(self.num_documents, latent_g, 1)
        np.add.at(self.sum_f, latent_n, firings.value_n.astype(np.float64))
        np.maximum.at(self.max_f, latent_g, firings.maximum_g.astype(np.float64))
        _, exponent_n = np.frexp(firings.value_n)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
        bin_n = np.clip(exponent_n - 1 - LOWEST, 0, NUM_BINS - 1)
        np.add.at(self.histogram.reshape(-1), latent_n * NUM_BINS + bin_n, 1)
        np.add.at(self.kinds.reshape(-1), latent_n * self.kinds.shape[1] + kind_n, 1)
        source_g = self._kinds.source_n[firings.document_g]
        np.add.at(self.sources.reshape(-1), latent_g * self.sources.shape[1] + source_g, length_g.astype(np.int64))

    def columns(self) -> dict[str, np.ndarray | pa.Array]:
        """Columns of `latents.parquet`; means and shares are over firing tokens, NaN for a latent that never fired."""
        with np.errstate(invalid="ignore"):
            share_LK, share_LS = (counts / self.num_active[:, None] for counts in (self.kinds, self.sources))
            mean_L = self.sum_f / self.num_active
        shares = {"share_template": share_LK[:, TEMPLATE]}
        shares |= {f"share_role_{role}": share_LK[:, 2 + number] for number, role in enumerate(self._kinds.roles)}
        shares |= {f"share_source_{source}": share_LS[:, number] for number, source in enumerate(self._kinds.sources)}
        bins = pa.FixedSizeListArray.from_arrays(pa.array(self.histogram.reshape(-1)), NUM_BINS)
        return {
            "frequency": self.num_active / max(1, self.num_tokens),
            "num_active_tokens": self.num_active,
            "num_documents": self.num_documents,
            "mean_activation": mean_L,
            "max_activation": self.max_f,
            **shares,
            "histogram": bins.cast(pa.list_(pa.int64())),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("num_active", "num_documents", "sum_f", "max_f", "histogram", "kinds", "sources")
        return {name: getattr(self, name) for name in names} | {"num_tokens": np.array([self.num_tokens])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on after `arrays` of the same stream."""
        for name in self.arrays().keys() - {"num_tokens"}:
            getattr(self, name)[...] = arrays[name]
        self.num_tokens = int(arrays["num_tokens"][0])


def histogram_edges() -> str:
    """The NUM_BINS + 1 edges as JSON."""
    return json.dumps([2.0**exponent for exponent in range(LOWEST, HIGHEST + 1)])
