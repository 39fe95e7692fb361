"""The best documents of every latent in one stream and bounded memory: the strongest, or those of the highest score.

Shapes: g (latent, document) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from analysis.firings.firings import NO_TOKENS, DocumentFirings

# Firing tokens (and documents) held back before candidates are sorted; about 40 bytes each, besides what is kept.
PENDING_TOKENS = 2**17
ARRAYS = ("latent", "document", "maximum", "length", "position", "value", "score")


class TopDocuments:
    """The `num_documents` documents with the highest score of every latent; ties go to the lower document number.

    Candidates pile up until they outweigh what is already kept, then one sort keeps the best; a document below the
    last of a full list is never a candidate. So memory is bounded by the result, and the result by
    num_latents * num_documents documents' firing tokens.
    """

    def __init__(self, num_latents: int, num_documents: int) -> None:
        self._num_documents = num_documents
        self.floor_L = np.full(num_latents, -np.inf)
        self._parts: list[tuple[DocumentFirings, np.ndarray]] = []
        self._kept = self._pending = 0

    def add(self, firings: DocumentFirings, score_g: np.ndarray | None = None) -> None:
        """Adds whole documents, each (latent, document) pair at most once over all calls. The score is the maximum,
        unless given.
        """
        score_g = firings.maximum_g if score_g is None else score_g
        index_g = np.flatnonzero(score_g >= self.floor_L[firings.latent_g])
        candidates = firings.select(index_g)
        self._parts.append((candidates, score_g[index_g]))
        self._pending += _size(candidates)
        if self._pending > max(PENDING_TOKENS, self._kept):
            self._compact()

    def result(self) -> DocumentFirings:
        """The best documents, sorted by latent and rank."""
        return self._compact()[0]

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is kept so far."""
        best, score_g = self._compact()
        return dict(zip(ARRAYS, (*best.arrays(), score_g), strict=True))

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on after `arrays` of the same stream."""
        self._parts = [(DocumentFirings(*(arrays[name] for name in ARRAYS[:-1])), arrays["score"])]
        self._pending = 1
        self._compact()

    def _compact(self) -> tuple[DocumentFirings, np.ndarray]:
        if len(self._parts) == 1 and not self._pending:
            return self._parts[0]
        if not self._parts:
            nothing = np.empty(0, dtype=np.float32)
            self._parts = [(DocumentFirings.silent(NO_TOKENS, NO_TOKENS, nothing), nothing)]
        candidates = DocumentFirings.concatenate([part for part, _ in self._parts])
        score_g = np.concatenate([scores for _, scores in self._parts])
        order_g = np.lexsort((candidates.document_g, -score_g, candidates.latent_g))
        order_g = order_g[ranks(candidates.latent_g[order_g]) < self._num_documents]
        best, score_g = candidates.select(order_g), score_g[order_g]
        last_g = ranks(best.latent_g) == self._num_documents - 1
        self.floor_L[best.latent_g[last_g]] = score_g[last_g]
        self._parts, self._kept, self._pending = [(best, score_g)], _size(best), 0
        return best, score_g


def _size(firings: DocumentFirings) -> int:
    return max(len(firings.position_n), len(firings.latent_g))


def ranks(sorted_g: np.ndarray) -> np.ndarray:
    """Position of every entry within its run of equal entries: [5, 5, 5, 8, 8] -> [0, 1, 2, 0, 1]."""
    start_g = np.searchsorted(sorted_g, sorted_g, side="left")
    return np.arange(len(sorted_g)) - start_g
