"""Training without stored activations: the models compute each shard when the lanes come to it.

Tokens must be there (`python -m extract.tokens`). A shard is computed by the code of extraction, held in memory while
the current or next window of a lane lies in it, and freed. So every token has the values of the stored one, bit for bit
on the same hardware. The stream of tokens is the stored one too where the calibration (`train.calibration`) covers all
shards. Where it covers some, it is another one:

- Statistics, and with them the scaling, come from the calibrated shards.
- Outliers of the other shards are not known in advance and count as training tokens. So lanes have other borders, and
  tokens another order.
- Where the order comes to such an outlier, the next token of its shard that is none replaces it, cyclically.
  Replacements are counted.

Held-out documents are computed once, in batches of their own: their values equal stored ones up to the rounding of a
forward pass with other padding.
Shapes: B tokens of a batch, T of a shard, H held-out ones, M models, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.activations import decisive_settings, worker_device
from extract.codecs import Encoded
from extract.errors import BadInput
from extract.live import LiveModels, LiveShard
from extract.stores import TokenStore
from train.calibration import Calibration, beyond, cached_calibration, calibrate, spread_shards
from train.config import TrainSettings
from train.data import check_size, content_of, heldout, room
from train.heldout import HeldoutTokens, compute_heldout
from train.kept import scaling
from train.lanes import Lanes, Span
from train.meeting import ALONE, Place
from train.residency import Peak, holds, host_memory, peak
from train.runs import selected_pair
from train.shard_pool import ShardPool

log = logging.getLogger(__name__)
ON_THE_WAY = 2  # shards beside those that are held: one in the models, one being encoded


class OnlineActivations:
    """Activations of M models as `train.data.TrainingData`, computed from the tokens of a store while they are read.

    `is_heldout` (num_documents,) marks documents that are never trained on; `num_replaced` of the tokens read so far
    stood in for outliers. To be closed: threads have work queued.

    A read waits for shards that are being computed; `expect` and `close` end waits for what they give up with
    CancelledError.
    """

    def __init__(self, settings: TrainSettings, tokens: TokenStore, place: Place):
        self.models, self.tokens, self._place = settings.pairs[selected_pair(settings)], tokens, place
        self.num_replaced = 0
        self._settings, self._lock = settings, Lock()
        self._content = content_of(tokens, tokens.folder.parent / "kept")
        self.is_heldout = heldout(self._content, settings.data.heldout_fraction, tokens.folder)
        places = [settings.place(model) for model in self.models]
        self._live = LiveModels(settings, tokens, places, worker_device(settings.activations.device, os.environ))
        self._decided_by = [
            decisive_settings(settings, tokens, place.model, place.hookpoint, Path(settings.outputs))
            for place in places
        ]
        self._shards = tokens.shard_documents()
        self._pool = ShardPool(self._live, self._shards)
        self._heldout_future: Future[HeldoutTokens] | None = None
        self._first_rows = tokens.row_starts[[documents.start for documents in self._shards]]
        self._tokens_of_shards = np.add.reduceat(tokens.lengths, [documents.start for documents in self._shards])
        self._calibrated_shards = spread_shards(self._tokens_of_shards, settings.data.calibration_tokens)
        later_tokens = np.maximum(tokens.lengths - settings.kept.skip_first_tokens, 0)
        self.train_tokens = np.where(self.is_heldout, 0, later_tokens)

    @classmethod
    def open(cls, settings: TrainSettings, place: Place = ALONE) -> OnlineActivations:
        """Check everything that can be refused, then calibrate: only that loads the models, unless it was done before.
        `place` among the ranks of the run decides which lanes are read here.

        Raises BadInput for tokens that are missing or too few, models that cannot be used, and more activations at a
        time than fit the host's memory, or this rank's part of it.
        """
        folder = settings.tokens_folder
        if not (folder / "manifest.json").exists():
            raise BadInput(f"There are no tokens in {folder}. Run python -m extract.tokens with the same settings.")
        data = cls(settings, TokenStore(folder), place)
        check_size(data, settings)
        data._check_memory()
        try:
            data._calibrate()
        except BaseException:
            data.close()
            raise
        return data

    @property
    def d_model(self) -> int:
        return self._live.d_model

    @property
    def share_dropped(self) -> float:
        """Of the tokens of the calibrated shards."""
        return self._calibration.share_dropped

    @property
    def content_sha256(self) -> list[str]:
        """The hash of the tokens, then for each model one of all that decides its activations."""
        decided = [json.dumps(settings, sort_keys=True).encode() for settings in self._decided_by]
        return [self.tokens.manifest.content_sha256(), *(hashlib.sha256(text).hexdigest() for text in decided)]

    @property
    def weights(self) -> dict[str, Any]:
        found = [settings["model"]["weights"] for settings in self._decided_by]
        return dict(zip(self.models, found, strict=True))

    def train_rows(self, shard: int) -> np.ndarray:
        """Rows of the training tokens of a shard, ascending, int64: those at later positions of documents that are not
        held out, without the outliers that the calibration met.
        """
        rows, position = self._rows(self._shards[shard])
        documents = slice(self._shards[shard].start, self._shards[shard].stop)
        is_heldout = np.repeat(self.is_heldout[documents], self.tokens.lengths[documents])
        rows = rows[(position >= self._settings.kept.skip_first_tokens) & ~is_heldout]
        return rows[~np.isin(rows, self._calibration.outliers)]

    def heldout_rows(self, max_tokens: int | None) -> np.ndarray:
        """Rows of kept held-out tokens, at most `max_tokens` of the data.max_validation_tokens that are held."""
        return self._heldout().result().rows[:max_tokens]

    def expect(self, spans: Sequence[Span]) -> None:
        """Begin to compute the shards of these parts, in their order, and free all others.

        The held-out tokens go first: a pass over them would wait for every shard in the queue. What went wrong with
        them is raised here, before a validation asks for them.
        """
        future = self._heldout()
        if spans and future.done():
            future.result()
        self._pool.hold(span.shard for span in spans)

    def fetch(self, span: Span) -> None:
        """Nothing to do: the shard has been begun, and whoever reads it waits for it."""

    def buffer(self, num_tokens: int, pinned: bool = False) -> Encoded:
        """Room for `num_tokens` tokens, (B * M, D), as they are held, or float32 if the models' codecs differ."""
        return room(self._live.codecs, num_tokens, self.d_model, pinned)

    def read(self, rows_B: np.ndarray, into: Encoded) -> None:
        """Fill a buffer with the activations of training rows, outliers replaced, or of held-out rows."""
        documents_B = np.searchsorted(self.tokens.row_starts, rows_B, side="right") - 1
        heldout_B = self.is_heldout[documents_B]
        if heldout_B.any():
            tokens = self._heldout().result()
            _copy(tokens.encoded, tokens.index(rows_B[heldout_B]), into, np.flatnonzero(heldout_B))
        shards_B = np.searchsorted(self._first_rows, rows_B, side="right") - 1
        for number in np.unique(shards_B[~heldout_B]).tolist():
            place = np.flatnonzero((shards_B == number) & ~heldout_B)
            shard = self._pool.shard(number)
            _copy(shard.encoded, self._index(number, shard, rows_B[place]), into, place)

    def close(self) -> None:
        """Stop the models, free the shards, and say what was computed."""
        self._pool.close()
        if self._pool.num_computed:
            log.info(
                "data=online: the models computed %d tokens at %.0f tokens/s; %d of the tokens read replaced outliers",
                self._pool.num_computed,
                self._pool.num_computed / self._pool.seconds,
                self.num_replaced,
            )

    def _check_memory(self) -> None:
        """Say how much memory the run takes on this rank; BadInput if that is more than there is."""
        settings, training, tokens_of_shards = self._settings, self._settings.training, self._tokens_of_shards
        kept_of_shards = np.add.reduceat(self.train_tokens, [documents.start for documents in self._shards])
        num_lanes, window = settings.data.num_lanes, settings.data.shuffle_window
        lanes = Lanes(int(kept_of_shards.sum()), num_lanes, window, self._place.rank, self._place.size)
        held = holds(lanes, settings.seed, kept_of_shards, training.num_tokens_per_step, training.num_steps)
        calibrated = Peak(len(self._calibrated_shards), int(tokens_of_shards[self._calibrated_shards].sum()))
        most = max(peak(held, tokens_of_shards), calibrated, key=lambda each: each.tokens)
        tokens = most.tokens + self._max_heldout_tokens()
        on_the_way = ON_THE_WAY * self._live.computed_bytes(int(tokens_of_shards.max()))
        limit_gb = settings.data.memory_gb or host_memory() / 1e9 / max(1, self._place.local_size)
        check_memory(most.shards, tokens * self._live.bytes_per_token + on_the_way, limit_gb)

    def _calibrate(self) -> None:
        """Learn the scaling, and which tokens of the calibrated shards are outliers; from the file of an earlier run of
        the same settings where there is one.
        """
        settings, kept = self._settings, dataclasses.asdict(self._settings.kept)
        key = {"shards": self._calibrated_shards, "kept": kept, "data": self.content_sha256}
        self._calibration = cached_calibration(Path(settings.outputs) / "online", key, self._compute_calibration)
        statistics, kind = self._calibration.statistics, settings.crosscoder.activation_scaling
        self.activation_mean, self.activation_scale = scaling(statistics, kind, self.models)
        documents = np.searchsorted(self.tokens.row_starts, self._calibration.outliers, side="right") - 1
        np.subtract.at(self.train_tokens, documents[~self.is_heldout[documents]], 1)

    def _compute_calibration(self) -> Calibration:
        chosen = self._calibrated_shards
        log.info("data=online: calibrating on %d of %d shards", len(chosen), len(self._shards))
        self._pool.hold(chosen)
        rows, position = zip(*(self._rows(self._shards[number]) for number in chosen), strict=True)
        shards = [self._pool.shard(number) for number in chosen]
        calibration = calibrate(shards, np.concatenate(rows), np.concatenate(position), self._settings.kept)
        self._pool.hold([])
        return calibration

    def _heldout(self) -> Future[HeldoutTokens]:
        """The held-out tokens, begun by the first call."""
        with self._lock:
            if self._heldout_future is None:
                self._heldout_future = self._pool.submit(self._compute_heldout)
            return self._heldout_future

    def _compute_heldout(self) -> HeldoutTokens:
        skip, limit_M = self._settings.kept.skip_first_tokens, self._calibration.limit_M
        return compute_heldout(
            self._pool.compute,
            lambda shard, position_T: (position_T >= skip) & ~beyond(limit_M, shard.norms_MT),
            self.tokens,
            sorted(np.flatnonzero(self.is_heldout), key=self._content.__getitem__),
            self._max_heldout_tokens(),
            self._settings.corpus.tokens_per_shard,
        )

    def _max_heldout_tokens(self) -> int:
        found, limit = int(self.tokens.lengths[self.is_heldout].sum()), self._settings.data.max_validation_tokens
        return found if limit is None else min(found, limit)

    def _rows(self, documents: range) -> tuple[np.ndarray, np.ndarray]:
        """Rows (T,) of the tokens of consecutive documents, and their positions there."""
        starts = self.tokens.row_starts[documents.start : documents.stop + 1]
        rows_T = np.arange(starts[0], starts[-1])
        return rows_T, rows_T - np.repeat(starts[:-1], np.diff(starts))

    def _index(self, number: int, shard: LiveShard, rows: np.ndarray) -> np.ndarray:
        """Where in a shard the training tokens `rows` are, or what replaces them."""
        first, limit_M = self._first_rows[number], self._calibration.limit_M
        index = rows - first
        found = beyond(limit_M, shard.norms_MT[:, index])
        if found.any():
            train = self.train_rows(number) - first
            good = train[~beyond(limit_M, shard.norms_MT[:, train])]
            if not len(good):
                raise BadInput(
                    f"All {len(train)} training tokens of shard {number} exceed kept.max_norm_ratio="
                    f"{self._settings.kept.max_norm_ratio:g} times the mean norm of the calibrated shards. "
                    f"Raise it, or data.calibration_tokens={self._settings.data.calibration_tokens}."
                )
            index[found] = good[np.searchsorted(good, index[found]) % len(good)]
            self._count_replaced(int(found.sum()))
        return index

    def _count_replaced(self, number: int) -> None:
        with self._lock:
            before, self.num_replaced = self.num_replaced, self.num_replaced + number
        if self.num_replaced.bit_length() > before.bit_length():  # at 1, 2, 4, 8, ...
            log.info("data=online: %d of the tokens read stood in for outliers", self.num_replaced)


def check_memory(num_shards: int, num_bytes: int, limit: float) -> None:
    """Say what a rank holds at a time; BadInput if it is more than `limit`, in 10^9 bytes."""
    needed = num_bytes / 1e9
    if needed > limit:
        raise BadInput(
            f"data=online holds up to {num_shards} shards and takes {needed:.3g} GB of memory for activations; it may "
            f"take {limit:.3g} GB (data.memory_gb, else a rank's part of what the host has). Take fewer lanes "
            f"(data.num_lanes), smaller windows (data.shuffle_window), shards (tokens with a lower "
            f"corpus.tokens_per_shard) or values (activations.codec=fp8), or fewer data.max_validation_tokens and "
            f"data.calibration_tokens. Or extract the activations and leave out data=online."
        )
    log.info("data=online: up to %d shards at a time, %.2f GB of activations of %.0f", num_shards, needed, limit)


def _copy(encoded: list[Encoded], index: np.ndarray, into: Encoded, place: np.ndarray) -> None:
    """Tokens `index` of every model to the places of a batch."""
    for m, source in enumerate(encoded):
        rows = place * len(encoded) + m
        if source.codes_ND.dtype == into.codes_ND.dtype:
            _records(into.codes_ND)[rows] = _records(source.codes_ND)[index]
        else:
            into.codes_ND[rows] = source.codes_ND[index].to(into.codes_ND.dtype)
        if source.scales_N is not None and into.scales_N is not None:
            into.scales_N[rows] = source.scales_N[index]


def _records(codes_ND: Tensor) -> np.ndarray:
    """The rows (N,), each as one value: copied whole."""
    data = codes_ND.view(torch.uint8).numpy()
    return data.view(f"V{data.shape[1]}")[:, 0]
