"""The largest scores seen so far, on a CPU: in memory that does not grow with the matrix, in little more than a look.

Of a chunk only those scores become candidates that reach a bound, the smallest of S scores that were seen before. As
the bound rises, candidates become few. On a CPU their number may decide the sizes of tensors; the form for GPUs, where
it must not, is `train.slots`.

Shapes: N entries, S selected, B tokens, C latents of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from train.radix import INTEGERS, AllReduce, NarrowingDigits, chosen, find_cut, key_bits, score_keys

BLOCK_SIZE = 1 << 18  # scores compared at once on a CPU, so that the mask stays in its cache
SAMPLE_SIZE = 1 << 15  # scores that a first bound is guessed from


class Entries(NamedTuple):
    """`score` (N,) = code * scale, `code` (N,), `position` (N,) = token * num_latents + latent, int64."""

    score: Tensor
    code: Tensor
    position: Tensor

    @classmethod
    def join(cls, parts: list[Entries]) -> Entries:
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def at(self, index_N: Tensor) -> Entries:
        return Entries(self.score[index_N], self.code[index_N], self.position[index_N])


class Chunk(NamedTuple):
    """A rectangle of the matrix of scores: codes (B, C), a scale >= 0 for each latent, and where its corner lies.

    Its rows are the tokens numbered `token_B` or, where that is None, those from `first_token` on.
    """

    pre_BC: Tensor
    scale_C: Tensor
    first_token: int
    first_latent: int
    token_B: Tensor | None = None

    @property
    def score_dtype(self) -> torch.dtype:
        """The wider dtype of codes and scales."""
        return torch.promote_types(self.pre_BC.dtype, self.scale_C.dtype)

    def entries(self, flat_N: Tensor, num_latents: int) -> Entries:
        """The entries at flat positions of the rectangle."""
        row_N = flat_N // self.pre_BC.shape[1]
        column_N = flat_N - row_N * self.pre_BC.shape[1]
        scale_N = self.scale_C[column_N]
        code_N = self.pre_BC.take(flat_N).to(self.score_dtype)
        token_N = row_N + self.first_token if self.token_B is None else self.token_B[row_N]
        position_N = token_N * num_latents + column_N + self.first_latent
        return Entries(code_N * scale_N, code_N, position_N)


class Candidates(Protocol):
    """What may still be among the `num_selected` largest scores of a matrix."""

    def __init__(self, num_selected: int, num_tokens: int, num_latents: int): ...

    def add(self, chunk: Chunk) -> Tensor:
        """Look at a chunk, which may be overwritten afterwards; whether all of it is finite, a bool tensor ()."""
        ...

    def largest(self, all_reduce: AllReduce | None) -> Entries:
        """The chosen entries, sorted by position: of this rank's entries those not below the cut of all ranks."""
        ...


class Growing:
    """At most 2 S + BLOCK_SIZE candidates (or 2 S + a row, if that is longer), fewer if fewer scores are positive."""

    def __init__(self, num_selected: int, num_tokens: int, num_latents: int):
        self._num_selected, self._num_latents = num_selected, num_latents
        self._num_positions = num_tokens * num_latents
        self._parts: list[Entries] = []
        self._num_entries = 0
        self._bound = 0.0  # the smallest of `num_selected` scores that were seen, once there were so many

    def add(self, chunk: Chunk) -> Tensor:
        if self._bound > 0:
            self._search(chunk, self._bound)
        else:
            self._search_first(chunk)
        return _all_finite(chunk.pre_BC) & chunk.scale_C.isfinite().all()

    def largest(self, all_reduce: AllReduce | None) -> Entries:
        self._thin(all_reduce)
        kept = self._parts[0]
        return kept.at(kept.position.argsort())

    def _search_first(self, chunk: Chunk) -> None:
        """While there is no bound, take what is above a guess, or above a lower one where that proves too high."""
        before = list(self._parts), self._num_entries
        for guess in self._guesses(chunk):
            (self._parts, self._num_entries), self._bound = (list(before[0]), before[1]), 0.0
            self._search(chunk, guess)
            if guess == 0:
                return
            self._thin(None)
            if self._bound >= guess:
                return

    def _guesses(self, chunk: Chunk) -> Iterator[float]:
        """Scores that about `num_selected` others of the chunk exceed, and four times as many, from a sample; then 0.

        Four standard deviations are added to the rank that they are expected to have in the sample.
        """
        num_scores = chunk.pre_BC.numel()
        if num_scores > 4 * self._num_selected:
            stride = max(1, num_scores // SAMPLE_SIZE)
            while math.gcd(stride, chunk.pre_BC.shape[1]) > 1:
                stride += 1  # so that all latents are sampled
            sample = chunk.entries(torch.arange(0, num_scores, stride), self._num_latents).score
            expected = len(sample) * self._num_selected / num_scores
            rank = math.ceil(expected + 4 * math.sqrt(expected) + 8)
            descending = sample.topk(min(4 * rank, len(sample))).values.tolist()
            yield from (descending[n - 1] for n in (rank, 4 * rank) if n < len(sample) and descending[n - 1] > 0)
        yield 0.0

    def _search(self, chunk: Chunk, bound: float) -> None:
        """Take all scores of a chunk that are at least `bound`, or at least the bound that rises on the way."""
        num_rows, num_columns = chunk.pre_BC.shape
        block_rows = max(1, BLOCK_SIZE // max(1, num_columns))
        lower_C, found = _lower_bits(chunk, bound), [torch.empty(0, dtype=torch.int64)]
        for start in range(0, num_rows, block_rows):
            flat_N = _at_least(chunk.pre_BC[start : start + block_rows], lower_C) + start * num_columns
            found.append(flat_N)
            self._num_entries += len(flat_N)
            if self._num_entries > 2 * self._num_selected:
                self._parts.append(chunk.entries(torch.cat(found), self._num_latents))
                self._thin(None)
                lower_C, found = _lower_bits(chunk, max(bound, self._bound)), found[:1]
        self._parts.append(chunk.entries(torch.cat(found), self._num_latents))

    def _thin(self, all_reduce: AllReduce | None) -> None:
        """Leave the `num_selected` largest."""
        entries = Entries.join(self._parts)
        key_N = score_keys(entries.score)
        digits = NarrowingDigits(key_N, entries.position, self._num_positions)
        cut = find_cut(digits, torch.tensor([self._num_selected]), key_bits(key_N), self._num_positions, all_reduce)
        kept = entries.at(chosen(key_N, entries.position, cut).nonzero().squeeze(1))
        self._parts, self._num_entries = [kept], len(kept.score)
        if 0 < self._num_selected == self._num_entries:
            self._bound = float(kept.score.min())


def _all_finite(values: Tensor) -> Tensor:
    """A sum is one quick pass; only when it is not finite can a value be, and each is looked at."""
    finite = values.sum().isfinite()
    return finite if finite else values.isfinite().all()


def _lower_bits(chunk: Chunk, bound: float) -> np.ndarray:
    """For each latent of a chunk the bits of a code that no code below can reach `bound` with once it is scaled.

    Near the smallest float, products and quotients are not exact to a relative error: there, all positive codes can.
    """
    limits = torch.finfo(chunk.pre_BC.dtype)
    negligible = max(limits.tiny / limits.eps, torch.finfo(chunk.scale_C.dtype).tiny / limits.eps)
    quotient_C = (bound if bound > negligible else 0.0) / chunk.scale_C.to(chunk.score_dtype)
    lower_C = (quotient_C * (1 - 4 * limits.eps)).to(chunk.pre_BC.dtype)
    lower_C = torch.where(lower_C > negligible, lower_C, 0.0)
    return lower_C.view(INTEGERS[lower_C.element_size()]).clamp(min=1).numpy()


def _at_least(pre_BC: Tensor, lower_C: np.ndarray) -> Tensor:
    """Flat positions of the codes whose bits are at least `lower_C`; numpy takes a quarter of torch's time."""
    return torch.from_numpy(np.flatnonzero(pre_BC.view(INTEGERS[pre_BC.element_size()]).numpy() >= lower_C))
