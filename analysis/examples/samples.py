"""Documents drawn for latents, to test descriptions of them: in the one pass, bounded memory.

    activating  the documents of lowest hash(latent, document) among those in which it fires: a uniform sample, then cut
                into strata of equal size by the maximum
    near_miss   the documents of the highest pre-activation among those in which it does not fire, which stands in the
                place of a firing token
    silent      of a pool of documents, those of lowest hash among the ones in which it does not fire

For H latents, with the default settings and f firing tokens in an activating document, this keeps H * (50 * (24 + 8 f)
+ 25 * 32 + 2048) bytes: at 114,688 latents and f = 10, 923 MB; of the 10,000 that some of the models may
own, 80 MB.

Shapes: L latents, of which H are sampled, P documents of the pool, g (latent, document) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.examples.top_documents import TopDocuments, ranks
from analysis.firings.config import ExamplesConfig
from analysis.firings.firings import DocumentFirings
from analysis.firings.reading import Reading

ACTIVATING, NEAR_MISS, SILENT = "activating", "near_miss", "silent"
# Documents that silent ones are drawn from.
POOL = 2048


@dataclass(frozen=True)
class DrawnSamples:
    """Drawn documents: `quantile_g` is the stratum of activating ones and -1 for the other kinds."""

    firings: DocumentFirings
    kind_g: list[str]
    quantile_g: np.ndarray


class Samples:
    """Draws documents for the latents of the mask `wanted_L`."""

    def __init__(self, wanted_L: np.ndarray, reading: Reading, config: ExamplesConfig):
        self._config, self._wanted_L, num_latents = config, wanted_L, len(wanted_L)
        self._latent_H = np.flatnonzero(wanted_L)
        self._place_L = wanted_L.cumsum() - 1
        self._activating = TopDocuments(num_latents, config.num_quantiles * config.samples_per_quantile)
        self._near_misses = TopDocuments(num_latents, config.num_near_miss)
        self._pool_P = _pool(reading, config.seed)
        self._in_pool_n = np.full(len(reading.kept_n), -1)
        self._in_pool_n[self._pool_P] = np.arange(len(self._pool_P))
        self._fires_HP = np.zeros((len(self._latent_H), len(self._pool_P)), dtype=bool)

    def add(self, firings: DocumentFirings) -> None:
        """Adds whole documents of texts that are new."""
        wanted = firings.where(self._wanted_L[firings.latent_g])
        # The lowest hashes are the highest scores.
        self._activating.add(wanted, -hashes(wanted.latent_g, wanted.document_g, self._config.seed))
        pool_g = self._in_pool_n[wanted.document_g]
        pooled_g = pool_g >= 0
        self._fires_HP[self._place_L[wanted.latent_g[pooled_g]], pool_g[pooled_g]] = True

    @property
    def near_miss_floor_L(self) -> np.ndarray:
        """The pre-activation (L,) that a document must reach to be a near miss.

        Only positive ones: a pre-activation that the ReLU silences is none.
        """
        wanted_L = self._wanted_L & (self._config.num_near_miss > 0)
        return np.where(wanted_L, np.maximum(self._near_misses.floor_L, np.finfo(np.float32).tiny), np.inf)

    def add_near_misses(self, firings: DocumentFirings) -> None:
        """Adds candidates in documents of texts that are new."""
        self._near_misses.add(firings)

    def result(self) -> DrawnSamples:
        """All samples, sorted by latent within each kind; none of latents that never fired."""
        activating, near = self._activating.result(), self._near_misses.result()
        order_g = np.lexsort((activating.document_g, activating.maximum_g, activating.latent_g))
        activating = activating.select(order_g)
        fired = np.unique(activating.latent_g)
        near = near.select(np.flatnonzero(np.isin(near.latent_g, fired)))
        silent = self._silent(fired, near)
        quantile_g = strata(activating.latent_g, self._config.num_quantiles)
        others = np.full(len(near.latent_g) + len(silent.latent_g), -1)
        counts = {ACTIVATING: len(quantile_g), NEAR_MISS: len(near.latent_g), SILENT: len(silent.latent_g)}
        kind_g = [kind for kind, count in counts.items() for _ in range(count)]
        parts = DocumentFirings.concatenate([activating, near, silent])
        return DrawnSamples(parts, kind_g, np.concatenate([quantile_g, others]))

    def _silent(self, fired: np.ndarray, near: DocumentFirings) -> DocumentFirings:
        """Documents of the pool in which a latent of `fired` neither fires nor nearly does."""
        latents, documents = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        bounds = np.searchsorted(near.latent_g, [fired, fired + 1])
        for latent, first, last in zip(fired, *bounds, strict=True):
            silent_P = ~self._fires_HP[self._place_L[latent]]
            pool_g = self._in_pool_n[near.document_g[first:last]]
            silent_P[pool_g[pool_g >= 0]] = False
            candidates = self._pool_P[silent_P]
            chosen = np.sort(candidates[self._lowest(hashes(np.full(1, latent), candidates, self._config.seed))])
            latents.append(np.full(len(chosen), latent))
            documents.append(chosen)
        latent_g = np.concatenate(latents)
        return DocumentFirings.silent(latent_g, np.concatenate(documents), np.zeros(len(latent_g), dtype=np.float32))

    def _lowest(self, hash_g: np.ndarray) -> np.ndarray:
        """The places of the `num_silent` lowest hashes, in any order, of which no two are equal in practice."""
        num = self._config.num_silent
        return np.argpartition(hash_g, num)[:num] if num < len(hash_g) else np.arange(len(hash_g))

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            **{f"activating.{name}": array for name, array in self._activating.arrays().items()},
            **{f"near_misses.{name}": array for name, array in self._near_misses.arrays().items()},
            "fires": self._fires_HP,
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on after `arrays` of the same stream."""
        for name, documents in (("activating", self._activating), ("near_misses", self._near_misses)):
            own = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
            documents.restore(own)
        self._fires_HP[...] = arrays["fires"]


def _pool(reading: Reading, seed: int) -> np.ndarray:
    """Random documents of different texts that have kept tokens, ascending."""
    candidates = np.flatnonzero(reading.is_first_n & (reading.kept_n > 0))
    order = hashes(np.full(len(candidates), -1), candidates, seed).argsort(kind="stable")
    return np.sort(candidates[order[:POOL]])


def strata(sorted_latent_g: np.ndarray, num_quantiles: int) -> np.ndarray:
    """The stratum of each document, of those of one latent in ascending order of their maximum: 0 the weakest.

    n documents are cut into parts whose sizes differ by one at most: [7, 7, 7, 7, 7], 2 -> [0, 0, 0, 1, 1].
    """
    _, count_l = np.unique(sorted_latent_g, return_counts=True)
    return ranks(sorted_latent_g) * num_quantiles // np.repeat(count_l, count_l)


def hashes(latent_g: np.ndarray, document_g: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each (latent, document), the same in every process: splitmix64's finaliser, twice."""
    mixed = _mix(latent_g.astype(np.int64).view(np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15))
    return (_mix(mixed + document_g.astype(np.int64).view(np.uint64)) >> np.uint64(11)) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
