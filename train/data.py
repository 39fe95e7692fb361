"""What a crosscoder is trained on: the protocol, and activations read from the stores of all its models.

A *row* is the number of a token in the whole store: documents one after another, in the order of the token shards.
Shapes: B tokens, M models, D width, N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from extract.codecs import Codec, Encoded, codec_named, decode
from extract.errors import BadInput
from extract.stores import ActivationStore, TokenStore
from train.cache import cached
from train.config import TrainSettings
from train.kept import KeptTokens, keep, scaling
from train.lanes import Span
from train.runs import selected_pair
from train.staging import staged


class TrainingData(Protocol):
    """Activations of M models for the tokens of a store, wherever they come from.

    `activation_mean` (M, D) and `activation_scale` (M,) belong to the configured scaling; `share_dropped` is the share
    of all tokens that is left out, by position and norm; `train_tokens` (num_documents,) int64 counts the kept tokens
    of each document that is trained on, 0 for a held-out one; `content_sha256` are hashes of what is read, which a
    checkpoint records.
    """

    models: list[str]
    tokens: TokenStore
    activation_mean: Tensor
    activation_scale: Tensor
    train_tokens: np.ndarray

    @property
    def d_model(self) -> int: ...

    @property
    def share_dropped(self) -> float: ...

    @property
    def content_sha256(self) -> list[str]: ...

    @property
    def weights(self) -> dict[str, Any]:
        """What `extract.weights.weights_of` found of each model, by name; {} where it is not known."""

    def train_rows(self, shard: int) -> np.ndarray:
        """Rows of the kept training tokens of a shard, ascending, int64."""

    def heldout_rows(self, max_tokens: int | None) -> np.ndarray:
        """Rows of kept held-out tokens, at most `max_tokens`."""

    def expect(self, spans: Sequence[Span]) -> None:
        """From now on only these parts of shards are read, until the next call: what holds others may be freed.

        No read is under way. Must be quick: it is called between batches. At the end of a run it is called with none
        while others wait for data, which ends their waits.
        """

    def fetch(self, span: Span) -> None:
        """Make a part of a shard quick to read; returns when it is. Called by several threads, ahead of the reads."""

    def buffer(self, num_tokens: int, pinned: bool = False) -> Encoded:
        """Room for `num_tokens` tokens as they are stored: codes (B * M, D), row b * M + m, and scales (B * M,)."""

    def read(self, rows_B: np.ndarray, into: Encoded) -> None:
        """Fill a buffer with the activations of rows in any order; ascending ones are read fastest."""

    def close(self) -> None:
        """Give back threads and memory; nothing is read afterwards."""


@dataclass
class ActivationPairs:
    """The stores of M models over the same documents, and which of their tokens count.

    `activation_mean` (M, D) and `activation_scale` (M,) belong to the configured scaling and come from the kept tokens
    of all documents; `content` holds the content hash of every document; `is_heldout` (num_documents,) marks documents
    that are never trained on.
    """

    models: list[str]
    tokens: TokenStore
    stores: list[ActivationStore]
    kept: KeptTokens
    content: list[str]
    is_heldout: np.ndarray
    activation_mean: Tensor
    activation_scale: Tensor

    def __post_init__(self) -> None:
        self._shards = self.tokens.shard_documents()
        self.train_tokens = np.where(self.is_heldout, 0, self.kept.of_documents(self.tokens.row_starts))

    @classmethod
    def open(cls, settings: TrainSettings) -> ActivationPairs:
        """Open and check everything that training reads.

        Raises BadInput for stores that are missing, belong to other tokens, differ in documents or width, or hold too
        few tokens.
        """
        models = settings.pairs[selected_pair(settings)]
        tokens = TokenStore(settings.tokens_folder)
        stores = [_open_store(settings, model) for model in models]
        _check_stores(tokens, stores)
        cache = tokens.folder.parent / "kept"
        kept = keep(stores, settings.kept, cache)
        content = content_of(tokens, cache)
        is_heldout = heldout(content, settings.data.heldout_fraction, tokens.folder)
        mean, scale = scaling(kept.statistics, settings.crosscoder.activation_scaling, models)
        pairs = cls(models, tokens, staged(stores, settings.data.staging), kept, content, is_heldout, mean, scale)
        check_size(pairs, settings)
        return pairs

    @property
    def num_models(self) -> int:
        return len(self.models)

    @property
    def num_documents(self) -> int:
        return self.tokens.num_documents

    @property
    def d_model(self) -> int:
        return self.stores[0].d_model

    @property
    def share_dropped(self) -> float:
        """Share of all tokens that is left out, by position and norm."""
        return 1 - float(self.kept.mask.mean())

    @property
    def num_train_tokens(self) -> int:
        return int(self.train_tokens.sum())

    @property
    def content_sha256(self) -> list[str]:
        """Hashes of what is read, which a checkpoint records: of the tokens, then of each model's activations."""
        return [store.manifest.content_sha256() for store in (self.tokens, *self.stores)]

    @property
    def weights(self) -> dict[str, Any]:
        found = [store.manifest.settings.get("model", {}).get("weights", {}) for store in self.stores]
        return dict(zip(self.models, found, strict=True))

    def document(self, document: int) -> tuple[Tensor, Tensor]:
        """Raw activations (N, M, D) float32 of one document and which of its tokens are kept, (N,) bool."""
        x_NMD = torch.stack([store.document(document).float() for store in self.stores], dim=1)
        start, end = self.tokens.row_starts[document : document + 2]
        return x_NMD, torch.from_numpy(self.kept.mask[start:end])

    def train_rows(self, shard: int) -> np.ndarray:
        """Rows of the kept training tokens of a shard, ascending, int64."""
        documents = slice(self._shards[shard].start, self._shards[shard].stop)
        first, last = self.tokens.row_starts[[documents.start, documents.stop]]
        is_heldout = np.repeat(self.is_heldout[documents], self.tokens.lengths[documents])
        return first + np.flatnonzero(self.kept.mask[first:last] & ~is_heldout)

    def heldout_rows(self, max_tokens: int | None) -> np.ndarray:
        """Rows of kept held-out tokens, documents in the order of their hashes: the first are a random choice."""
        starts, mask = self.tokens.row_starts, self.kept.mask
        documents = sorted(np.flatnonzero(self.is_heldout), key=self.content.__getitem__)
        rows = [starts[i] + np.flatnonzero(mask[starts[i] : starts[i + 1]]) for i in documents]
        return np.concatenate(rows)[:max_tokens] if rows else np.empty(0, dtype=np.int64)

    def expect(self, spans: Sequence[Span]) -> None:
        """Nothing is held: pages of a store that are no longer read make room by themselves."""

    def fetch(self, span: Span) -> None:
        """Bring the part of every model's shard into memory."""
        rows = self.train_rows(span.shard)[span.first : span.stop]
        for store in self.stores:
            store.read_ahead(int(rows[0]), int(rows[-1]))

    def buffer(self, num_tokens: int, pinned: bool = False) -> Encoded:
        """Room for `num_tokens` tokens, (B * M, D), as they are stored, or float32 if the models' codecs differ."""
        return room([store.codec for store in self.stores], num_tokens, self.d_model, pinned)

    def read(self, rows_B: np.ndarray, into: Encoded) -> None:
        """Fill a buffer with the activations of any rows."""
        for model, store in enumerate(self.stores):
            place = slice(model, None, self.num_models)
            if self._is_uniform():
                scales_B = None if into.scales_N is None else into.scales_N[place]
                store.read(rows_B, Encoded(into.codes_ND[place], scales_B))
            else:
                into.codes_ND[place] = store.gather(rows_B)

    def close(self) -> None:
        """Nothing is held."""

    def gather(self, rows_B: np.ndarray) -> Tensor:
        """Raw activations (B, M, D) of any rows, in the stored dtype (float32 if coded, or if the models' differ)."""
        return gather(self, rows_B)

    def _is_uniform(self) -> bool:
        return len({store.codec for store in self.stores}) == 1


def room(codecs: Sequence[Codec], num_tokens: int, d_model: int, pinned: bool) -> Encoded:
    """Room for tokens of models with these codecs, (B * M, D), as they are stored, or float32 if the codecs differ."""
    codec, rows = codecs[0] if len(set(codecs)) == 1 else codec_named("fp32"), num_tokens * len(codecs)
    codes = torch.empty(rows, d_model, dtype=codec.dtype, pin_memory=pinned)
    return Encoded(codes, torch.empty(rows, pin_memory=pinned) if codec.largest else None)


def gather(data: TrainingData, rows_B: np.ndarray) -> Tensor:
    """Raw activations (B, M, D) of any rows, decoded, in memory of their own."""
    buffer = data.buffer(len(rows_B))
    data.read(rows_B, buffer)
    return decode(buffer).view(len(rows_B), len(data.models), data.d_model)


def heldout_batches(
    data: TrainingData, num_tokens: int, max_tokens: int | None, part: int = 0, num_parts: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Part `part` of `num_parts` of raw held-out activations in batches of `num_tokens`, and the tokens' numbers in
    their batch, (b,) int64; the last batch may be smaller, and a part of it empty.
    """
    rows = data.heldout_rows(max_tokens)
    for start in range(0, len(rows), num_tokens):
        own = np.arange(part, min(num_tokens, len(rows) - start), num_parts)
        yield gather(data, rows[start + own]), torch.from_numpy(own)


def content_of(tokens: TokenStore, cache: Path) -> list[str]:
    """The content hash of every document: kept in the folder `cache`, because it takes all of the token shards."""

    def read() -> dict[str, Tensor]:
        hashes = b"".join(bytes.fromhex(document.content_sha256) for document in tokens)
        return {"content_sha256": torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, 32)}

    found = cached(cache, "content", {"tokens": tokens.manifest.content_sha256()}, read)
    return [bytes(row).hex() for row in found["content_sha256"].numpy()]


def heldout(content: list[str], fraction: float, folder: Path) -> np.ndarray:
    """Mask (num_documents,): true where the content hash, read as a number in [0, 1), lies below `fraction`.

    Equal text is on one side, whatever its doc_id, order or company.
    """
    is_heldout = np.array([int(sha256[:16], 16) < fraction * 2**64 for sha256 in content], dtype=bool)
    if fraction > 0 and not is_heldout.any():
        raise BadInput(
            f"data.heldout_fraction={fraction} holds out none of the {len(is_heldout)} documents of {folder}. "
            "Raise it, or set it to 0 to train without validation."
        )
    return is_heldout


def check_size(data: TrainingData, settings: TrainSettings) -> None:
    """BadInput for less than one batch of tokens to train on."""
    batch, found = settings.training.num_tokens_per_step, int(data.train_tokens.sum())
    if found < batch:
        raise BadInput(
            f"{settings.store} holds {found} tokens to train on (of {data.tokens.num_tokens}; the rest is held out or "
            f"dropped), less than one batch of training.num_tokens_per_step={batch}. "
            "Extract more text or take smaller batches."
        )


def _open_store(settings: TrainSettings, model: str) -> ActivationStore:
    place = settings.place(model)
    folder = settings.activations_folder(place.model, place.hookpoint)
    if not folder.exists():
        found = sorted(
            str(path.parent.relative_to(folder.parent.parent))
            for path in folder.parent.parent.glob("*/*/manifest.json")
        )
        raise BadInput(
            f"There are no activations of model {place.model} at hookpoint={place.hookpoint} in {settings.store}. "
            f"There are: {', '.join(found) or 'none'}. "
            "Run python -m extract.activations, or choose another hookpoint or store."
        )
    return ActivationStore(folder)


def _check_stores(tokens: TokenStore, stores: list[ActivationStore]) -> None:
    for store in stores:
        if store.manifest.tokens_sha256 != tokens.manifest.content_sha256():
            raise BadInput(
                f"{store.folder} was extracted from other tokens ({_short(store.manifest.tokens_sha256)}) than "
                f"{tokens.folder} holds ({_short(tokens.manifest.content_sha256())}). "
                "Extract the activations of this model again."
            )
        if store.keys != tokens.keys or not np.array_equal(store.lengths, tokens.lengths):
            raise BadInput(
                f"{store.folder} and {tokens.folder} differ in documents or their lengths. "
                "Run python -m extract.verify."
            )
        if store.d_model != stores[0].d_model:
            raise BadInput(
                f"{stores[0].folder} has width {stores[0].d_model}, {store.folder} has {store.d_model}. "
                "A crosscoder needs models of one width: choose another pair or hookpoint."
            )


def _short(sha256: str | None) -> str:
    return (sha256 or "unknown")[:12]
