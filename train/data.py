"""Batches of activations from the stores of all models of a crosscoder.

A *row* is the number of a token in the whole store: documents one after another, in the order of the token shards.
Training reads an endless sequence: epoch after epoch, each a permutation of all kept rows of the training documents,
drawn from (seed, epoch). Batch t is entries [t*B, (t+1)*B) of it: a pure function, so the position of a run is one
integer. Shapes: B tokens, M models, D width, N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.errors import BadInput
from extract.stores import ActivationStore, TokenStore
from train.config import TrainSettings
from train.kept import KeptTokens, keep, scaling
from train.runs import selected_pair


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
        self._starts = np.concatenate([[0], np.cumsum(self.tokens.lengths)])

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
        kept = keep(stores, tokens.lengths, settings.kept)
        content = [document.content_sha256 for document in tokens]
        is_heldout = _heldout(content, settings.data.heldout_fraction, tokens.folder)
        pairs = cls(
            models,
            tokens,
            stores,
            kept,
            content,
            is_heldout,
            *scaling(kept.statistics, settings.crosscoder.activation_scaling, models),
        )
        batch = settings.training.num_tokens_per_step
        if pairs.num_train_tokens < batch:
            raise BadInput(
                f"{settings.store} holds {pairs.num_train_tokens} tokens to train on (of {tokens.num_tokens}; the rest "
                f"is held out or dropped), less than one batch of training.num_tokens_per_step={batch}. "
                "Extract more text or take smaller batches."
            )
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
        return int(np.count_nonzero(self._is_trained()))

    @property
    def content_sha256(self) -> list[str]:
        """Hashes of what is read, which a checkpoint records: of the tokens, then of each model's activations."""
        return [store.manifest.content_sha256() for store in (self.tokens, *self.stores)]

    def document(self, document: int) -> tuple[Tensor, Tensor]:
        """Raw activations (N, M, D) float32 of one document and which of its tokens are kept, (N,) bool."""
        x_NMD = torch.stack([store.document(document).float() for store in self.stores], dim=1)
        start, end = self._starts[document : document + 2]
        return x_NMD, torch.from_numpy(self.kept.mask[start:end])

    def train_rows(self) -> np.ndarray:
        """Rows of the kept tokens of training documents, ascending, int64."""
        return np.flatnonzero(self._is_trained())

    def _is_trained(self) -> np.ndarray:
        return self.kept.mask & ~np.repeat(self.is_heldout, self.tokens.lengths)

    def heldout_rows(self, max_tokens: int | None) -> np.ndarray:
        """Rows of kept held-out tokens, documents in the order of their hashes: the first are a random choice."""
        documents = sorted(np.flatnonzero(self.is_heldout), key=self.content.__getitem__)
        rows = [np.arange(*self._starts[i : i + 2])[self.kept.mask[slice(*self._starts[i : i + 2])]] for i in documents]
        return np.concatenate(rows)[:max_tokens] if rows else np.empty(0, dtype=np.int64)

    def gather(self, rows_B: np.ndarray) -> Tensor:
        """Raw activations (B, M, D) of any rows, in the stored dtype (float32 if coded, or if the models' differ)."""
        documents_B = np.searchsorted(self._starts, rows_B, side="right") - 1
        positions_B = rows_B - self._starts[documents_B]
        x_BD = [store.gather(documents_B.tolist(), positions_B.tolist()) for store in self.stores]
        same_dtype = len({x.dtype for x in x_BD}) == 1
        return torch.stack(x_BD if same_dtype else [x.float() for x in x_BD], dim=1)


class BatchStream:
    """The training batches of a run. `batch(t)` depends on the store, seed, num_tokens_per_step and t alone."""

    def __init__(self, pairs: ActivationPairs, seed: int, num_tokens_per_step: int):
        self._pairs, self._seed, self._num_tokens = pairs, seed, num_tokens_per_step
        self._rows = pairs.train_rows()
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> Tensor:
        """Raw activations (B, M, D) of step `step`, counted from 0, in the stored dtype."""
        return self._pairs.gather(self.rows(step))

    def rows(self, step: int) -> np.ndarray:
        """The rows (B,) of step `step`."""
        start, end = step * self._num_tokens, (step + 1) * self._num_tokens
        parts = []
        while start < end:
            epoch, offset = divmod(start, len(self._rows))
            part = self._order(epoch)[offset : offset + end - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def describe(self, step: int) -> str:
        """Where step `step` lies, for messages."""
        start = step * self._num_tokens
        return f"tokens {start} to {start + self._num_tokens} of the run, epoch {start // len(self._rows)}"

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._epoch = epoch, generator.permutation(self._rows)
        return self._epoch[1]


def heldout_batches(pairs: ActivationPairs, num_tokens: int, max_tokens: int | None) -> Iterator[Tensor]:
    """Raw held-out activations in batches of `num_tokens`; the last may be smaller."""
    rows = pairs.heldout_rows(max_tokens)
    return (pairs.gather(rows[start : start + num_tokens]) for start in range(0, len(rows), num_tokens))


def _open_store(settings: TrainSettings, model: str) -> ActivationStore:
    folder = settings.activations_folder(model, settings.hookpoint)
    if not folder.exists():
        found = sorted(
            str(path.parent.relative_to(folder.parent.parent))
            for path in folder.parent.parent.glob("*/*/manifest.json")
        )
        raise BadInput(
            f"There are no activations of model {model} at hookpoint={settings.hookpoint} in {settings.store}. "
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


def _heldout(content: list[str], fraction: float, folder: Path) -> np.ndarray:
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
