"""How much of each language model's loss the crosscoder's reconstruction recovers, on held-out documents.

    loss recovered = (CE(zero) - CE(reconstructed)) / (CE(zero) - CE(clean))

CE is the mean cross-entropy, in nats, of the next token over all tokens but the first of each document; nothing is
predicted across documents or of padding. In `clean` a model runs as it is; in `reconstructed` its activations at its
hookpoint are replaced by what the crosscoder makes of the activations of all members on the same tokens; in `zero` they
are zero. 1 = the model predicts as well as with its own activations, 0 = no better than without any.

Only kept tokens are replaced: leading positions (`kept.skip_first_tokens`) and outliers keep their own activations in
all three, as every other measure leaves them out. Codes are those of inference, above the threshold. A member is
changed at its own hookpoint alone: where two members are layers of one model, the other layer is as that leaves it.

Sources: the ratio with zero-ablation, arXiv 2404.16014; tokens that the dictionary is not meant for left as they are,
SAEBench (arXiv 2503.09532). Shapes: T kept tokens of a batch, M members, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from extract.batches import length_batches
from train.config import TrainSettings
from train.data import ActivationPairs, TrainingData
from train.ranks import Group
from train.spliced import Batch, MemberModels, check_stored

# Raw activations (T, M, D) of this rank to their reconstructions, on any device; called by all ranks together.
Reconstruct = Callable[[Tensor], Tensor]


@dataclass
class HeldoutDocuments:
    """Token ids (n,) of each document, and which of its tokens are kept, (n,) bool."""

    token_ids: list[np.ndarray]
    is_kept: list[np.ndarray]

    @property
    def num_replaced(self) -> int:
        """Tokens whose activations are replaced."""
        return sum(int(kept.sum()) for kept in self.is_kept)

    @property
    def num_predicted(self) -> int:
        """Tokens that a cross-entropy is the mean over."""
        return sum(len(token_ids) - 1 for token_ids in self.token_ids)

    def batches(self, batch_tokens: int) -> list[Batch]:
        """All documents, in batches of at most `batch_tokens` tokens."""
        lengths = np.array([len(token_ids) for token_ids in self.token_ids], dtype=np.int64)
        return [
            Batch([self.token_ids[i] for i in batch], [self.is_kept[i] for i in batch])
            for batch in length_batches(lengths, batch_tokens)
        ]


def heldout_documents(data: TrainingData, num_tokens: int) -> HeldoutDocuments:
    """The held-out documents that hold the first `num_tokens` kept tokens, or all, in the order of validation. The last
    one ends with the last of these tokens.
    """
    rows, starts = data.heldout_rows(num_tokens), data.tokens.row_starts
    document_of = np.searchsorted(starts, rows, side="right") - 1
    found = HeldoutDocuments([], [])
    for document in dict.fromkeys(document_of.tolist()):
        token_ids = data.tokens.document(document).token_ids
        is_kept = np.zeros(len(token_ids), dtype=bool)
        is_kept[rows[document_of == document] - starts[document]] = True
        found.token_ids.append(token_ids)
        found.is_kept.append(is_kept)
    if len(rows):
        end = int(np.flatnonzero(found.is_kept[-1])[-1]) + 1
        found.token_ids[-1], found.is_kept[-1] = found.token_ids[-1][:end], found.is_kept[-1][:end]
    return found


class LossRecovered:
    """The language models of a pair and the held-out documents that they are run on. What no crosscoder changes, the
    cross-entropies of `clean` and `zero`, is computed by the first `measure` alone.
    """

    def __init__(self, settings: TrainSettings, data: TrainingData, num_tokens: int):
        """On documents that hold `num_tokens` kept tokens, of data.max_validation_tokens; they are found when first
        measured on. BadInput for models that cannot be used, or are not those whose activations `data` reads; none is
        loaded.
        """
        limit = settings.data.max_validation_tokens
        self._num_tokens = num_tokens if limit is None else min(num_tokens, limit)
        self.members, self._data = data.models, data
        self._models = MemberModels(settings, data.models, int(data.tokens.lengths.max()))
        if isinstance(data, ActivationPairs):
            check_stored(settings, self._models.places, data.stores)
        self._batch_tokens = settings.activations.batch_tokens
        self._documents: HeldoutDocuments | None = None
        self._unchanging: tuple[Tensor, Tensor] | None = None

    def load(self) -> None:
        """Load the language models, which stay."""
        self._models.load()

    @property
    def documents(self) -> HeldoutDocuments:
        """The same on all ranks."""
        if self._documents is None:
            self._documents = heldout_documents(self._data, self._num_tokens)
        return self._documents

    @torch.no_grad()
    def measure(self, reconstruct: Reconstruct, everyone: Group | None = None) -> dict[str, float]:
        """`val/cross_entropy/<member>/{clean,reconstructed,zero}`, nats a token, and `val/loss_recovered/<member>`, nan
        where zeros change nothing. Sums are in float64. Nothing where nothing is held out.

        The ranks of `everyone` divide the documents, batch by batch, and get the same values.
        """
        everyone, batches = everyone or Group(), self.documents.batches(self._batch_tokens)
        if not batches:
            return {}
        sums_3M = torch.zeros(3, len(self.members), dtype=torch.float64)
        for start in range(0, len(batches), everyone.size):
            own = batches[start + everyone.rank : start + everyone.size][:1]
            sums_3M += self._entropies(own[0] if own else None, reconstruct)
        mean_3M = everyone.sum(sums_3M, "cross-entropies") / self.documents.num_predicted
        clean_M, recons_M, zero_M = mean_3M
        if self._unchanging is None:
            self._unchanging = clean_M, zero_M
        clean_M, zero_M = self._unchanging
        return self._named(clean_M, recons_M, zero_M)

    def _entropies(self, batch: Batch | None, reconstruct: Reconstruct) -> Tensor:
        """(3, M) of a batch: clean, reconstructed, zero; the first and the last are zero once they are known. A rank
        without a batch takes part in the reconstruction.
        """
        if batch is None:
            reconstruct(torch.empty(0, len(self.members), self._models.d_model))
            return torch.zeros(3, len(self.members), dtype=torch.float64)
        is_new = self._unchanging is None
        x_TMD, clean_M = self._models.clean(batch, is_new)
        recons_M = self._models.replaced(batch, reconstruct(x_TMD))
        zero_M = self._models.replaced(batch, torch.zeros_like(x_TMD)) if is_new else torch.zeros_like(clean_M)
        return torch.stack([clean_M, recons_M, zero_M])

    def _named(self, clean_M: Tensor, recons_M: Tensor, zero_M: Tensor) -> dict[str, float]:
        recovered_M = torch.where(zero_M != clean_M, (zero_M - recons_M) / (zero_M - clean_M), torch.nan)
        columns = zip(self.members, clean_M.tolist(), recons_M.tolist(), zero_M.tolist(), strict=True)
        entropies = {
            f"val/cross_entropy/{member}/{kind}": value
            for member, *values in columns
            for kind, value in zip(("clean", "reconstructed", "zero"), values, strict=True)
        }
        recovered = zip(self.members, recovered_M.tolist(), strict=True)
        return entropies | {f"val/loss_recovered/{member}": value for member, value in recovered}
