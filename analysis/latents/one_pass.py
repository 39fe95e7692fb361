"""One pass over the kept tokens of a store: codes, and everything that is gathered from them, resumable.

Work beside the encoder's product is proportional to the latents that fire; no (B, L) tensor exists. What is kept does
not grow with the store, but for 2 bytes a token (whether it counts, and its kind), a few hundred a document, and rows
of document maxima, on disk. At L = 114,688, M = 2, D = 3584 in float32, with the default settings, 10 kinds and sources
and f = 10 firing tokens in a top document:

    weights                W_enc and W_dec 3.3 GB each; on one device
    sums of latent scaling 8 * 64 * L * 9               528 MB      `scaling.ScalingSums`
    counts, histograms     8 * L * (4 + 24 + 10)         35 MB      `activity.Activity`
    top documents          L * 20 * (24 + 8 f)          239 MB      `top_documents.TopDocuments`, twice while sorted
    samples                L * (50 * (24 + 8 f) + 25 * 32 + 2,048)      923 MB      `samples.Samples`, of all latents;
                           80 MB of 10,000 (analysis.examples.sampled=held)
    a batch of 2,048       activations, targets 0.3 GB, chunks of the encoder 64 MB, sums of rows 256 MB

and as much again as the sums, counts and documents take, while a state is saved.

Shapes: B tokens, M models, D width, L latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from analysis.config import AnalysisConfig
from analysis.examples.maxima import MaximaSpool
from analysis.examples.near_misses import NearMisses
from analysis.examples.samples import Samples
from analysis.examples.top_documents import TopDocuments
from analysis.firings.firings import Codes, DocumentFirings
from analysis.firings.reading import Reading, TokenBatch
from analysis.latents.activity import Activity
from analysis.latents.nulls import RandomDirections
from analysis.latents.one_behind import OneBehind
from analysis.latents.scaling import ScalingSums
from analysis.latents.state import PassState, Place
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.inference import inference_codes
from train.sparse import decode


class Resumable(Protocol):
    """What a pass gathers: its state as arrays, and back."""

    def arrays(self) -> dict[str, np.ndarray]: ...

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None: ...


class LatentPass:
    """What is gathered, and how a batch is added to it.

    `owned_L` masks the latents that some of the models may own, whose document maxima are kept, `sampled_L` those for
    which documents are drawn.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        reading: Reading,
        config: AnalysisConfig,
        owned_L: np.ndarray,
        sampled_L: np.ndarray,
        state: PassState,
    ) -> None:
        device, shape = crosscoder.W_dec.device, (crosscoder.num_latents, crosscoder.num_models)
        self._crosscoder, self._reading, self._state = crosscoder, reading, state
        self._operands = Operands.of(crosscoder)
        self._W_dec_LMD = crosscoder.W_dec.detach().unflatten(1, (crosscoder.num_models, crosscoder.d_model))
        assert crosscoder.threshold is not None
        self._threshold = crosscoder.threshold
        self._near_misses = NearMisses(self._operands.scale_L, self._threshold)
        self.sums = ScalingSums(*shape, reading.num_groups, device)
        self.directions = RandomDirections(*shape, crosscoder.d_model, config.nulls, device)
        self.activity = Activity(crosscoder.num_latents, reading.kinds)
        self.top = TopDocuments(crosscoder.num_latents, config.examples.top_documents)
        self.samples = Samples(sampled_L, reading, config.examples)
        self._parts: dict[str, Resumable] = {
            "sums": self.sums,
            "directions": self.directions,
            "activity": self.activity,
            "top": self.top,
            "samples": self.samples,
        }
        self._behind = OneBehind()
        self.next_batch = self.saved_batch = self._resume(owned_L)

    def _resume(self, owned_L: np.ndarray) -> int:
        found = self._state.load()
        place, arrays = found or (Place(0, 0), {})
        for name, part in self._parts.items():
            if found:
                part.restore(_under(name, arrays))
        self.maxima = MaximaSpool(self._state.spool, owned_L, place.num_rows)
        return place.num_batches

    @torch.inference_mode()
    def add(self, batch: TokenBatch) -> None:
        """Adds the next batch, and returns while documents and counts are still being added: `save` waits for them."""
        if len(batch.document_B):
            self._add(batch)
        self.next_batch += 1

    def _add(self, batch: TokenBatch) -> None:
        device = self._operands.b_dec.device
        # The batch before may raise these floors meanwhile: lower ones only let more candidates through.
        self._near_misses.begin(batch, self.samples.near_miss_floor_L)
        x_BMD = self._crosscoder.scale(batch.x_BMD.to(device))
        selection, code_S = inference_codes(self._threshold, x_BMD.flatten(1), self._operands, self._near_misses.watch)
        recons_BMD = decode(selection, code_S, len(x_BMD), self._operands).view_as(x_BMD)
        group_B = torch.from_numpy(batch.group_B).to(device)
        codes = Codes.of(selection, code_S, group_B, self._crosscoder.num_latents)
        error_BMD = x_BMD.sub_(recons_BMD)  # in the memory of what is not needed any more
        self.sums.add(codes, error_BMD, recons_BMD, self._W_dec_LMD, self.directions.add)
        firings = DocumentFirings.of(codes, batch.document_B, batch.position_B)
        num_tokens = len(x_BMD)  # the thread must not hold the activations themselves
        kind_n, near_misses = batch.kind_B[codes.token_n.cpu().numpy()], self._near_misses.found(batch)
        self._behind.submit(lambda: self._add_on_host(firings, kind_n, num_tokens, near_misses))

    def _add_on_host(
        self, firings: DocumentFirings, kind_n: np.ndarray, num_tokens: int, near_misses: DocumentFirings
    ) -> None:
        """Adds what a batch gives but for the sums; documents only where they are the first of their text."""
        self.activity.add(firings, kind_n, num_tokens)
        self.maxima.add(firings)
        is_first_n = self._reading.is_first_n
        firings = firings.where(is_first_n[firings.document_g])
        self.top.add(firings)
        self.samples.add(firings)
        self.samples.add_near_misses(near_misses.where(is_first_n[near_misses.document_g]))

    def save(self) -> None:
        """The next pass of the same identity goes on here."""
        self._behind.wait()
        if self.next_batch == self.saved_batch:
            return
        self.maxima.sync()
        arrays = {f"{name}.{key}": array for name, part in self._parts.items() for key, array in part.arrays().items()}
        self._state.save(Place(self.next_batch, self.maxima.num_rows), arrays)
        self.saved_batch = self.next_batch


def _under(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


def state_folder(folder: Path) -> Path:
    """Where the passes that fill `folder` keep their states."""
    return folder / "pass"
