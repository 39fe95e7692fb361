"""The largest scores seen so far on a GPU: `train.slots` in a few passes of Triton kernels.

    _append    of a chunk, the positive scores not below the bound are written behind the entries that are kept
    _count     histogram of one digit of the entries that agree with what was found of the cut (`train.radix`)
    _move      the entries not below the cut, to new slots

How many entries there are stays on the device: programs beyond the last one return at once. Entries are written in any
order (each program reserves its places by one atomic addition), but every entry has its own position and all are ranked
by (score, position), so what is chosen is the same each time, and it is sorted in the end.

Shapes: N places for entries, S slots, B tokens, C latents of a chunk. Tensors of shape (1,) stay on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.candidates import Chunk, Entries
from train.radix import KEY, AllReduce, find_cut
from train.slots import Slots, free_slots, sorted_slots

BLOCK = 1024
KEY_BITS = 31  # of a positive fp32 score


class KernelSlots:
    """S slots and behind them one place of 16 bytes for each entry of the largest chunk: codes fp32 or bf16."""

    def __init__(self, num_selected: int, num_tokens: int, num_latents: int):
        self._num_selected, self._num_latents = num_selected, num_latents
        self._num_positions = num_tokens * num_latents
        self._entries: Entries | None = None
        self._num_entries_1: Tensor
        self._bound_1: Tensor  # the key of the last of S entries; 1, the smallest, as long as there are fewer

    def add(self, chunk: Chunk) -> Tensor:
        entries = self._room_for(chunk)
        num_bad_1 = torch.zeros_like(self._num_entries_1)
        num_tokens, num_columns = chunk.pre_BC.shape
        _append[num_tokens, triton.cdiv(num_columns, BLOCK)](
            chunk.pre_BC,
            chunk.scale_C.float().contiguous(),
            *entries,
            self._num_entries_1,
            self._bound_1,
            num_bad_1,
            num_columns,
            *chunk.pre_BC.stride(),
            chunk.token_B,
            chunk.first_token,
            chunk.first_latent,
            self._num_latents,
            BLOCK=BLOCK,
        )
        kept, key_1 = self._largest(entries, None)
        for place, slots in zip(entries, kept, strict=True):
            place[: self._num_selected].copy_(slots)
        self._bound_1 = torch.where(self._num_entries_1 == self._num_selected, key_1, 1)
        return num_bad_1[0] == 0

    def largest(self, all_reduce: AllReduce | None) -> Entries:
        assert self._entries is not None, "No chunk was added."
        return sorted_slots(self._largest(self._entries, all_reduce)[0])

    def _room_for(self, chunk: Chunk) -> Entries:
        """The places, of which there are as many as the largest chunk so far may need."""
        num_places, device = self._num_selected + chunk.pre_BC.numel(), chunk.pre_BC.device
        if self._entries is None:
            score_N = torch.empty(num_places, device=device)
            self._entries = Entries(score_N, torch.empty_like(score_N), torch.empty_like(score_N, dtype=torch.int64))
            self._num_entries_1 = torch.zeros(1, dtype=torch.int64, device=device)
            self._bound_1 = torch.ones(1, dtype=torch.int64, device=device)
        missing = num_places - len(self._entries.score)
        if missing > 0:
            self._entries = Entries.join([self._entries, free_slots(missing, self._num_positions, self._entries)])
        return self._entries

    def _largest(self, entries: Entries, all_reduce: AllReduce | None) -> tuple[Entries, Tensor]:
        """The chosen entries in S slots and the key of the cut; from then on they are the only entries."""
        digits = _KernelDigits(entries, self._num_entries_1, self._num_positions)
        wanted_1 = torch.full_like(self._num_entries_1, self._num_selected)
        cut = find_cut(digits, wanted_1, KEY_BITS, self._num_positions, all_reduce)
        slots, num_moved_1 = free_slots(self._num_selected, self._num_positions, entries), torch.zeros_like(wanted_1)
        grid = (triton.cdiv(len(entries.score), BLOCK),)
        _move[grid](*entries, self._num_entries_1, *cut, *slots, num_moved_1, BLOCK=BLOCK)
        self._num_entries_1 = num_moved_1
        return slots, cut.key


def disagreement(device: torch.device) -> str | None:
    """That the kernels choose otherwise than torch on a small case; None if they do not."""
    return None if agree_with_torch(device) else "the kernels choose other scores than torch"


def agree_with_torch(device: torch.device) -> bool:
    """Whether both forms choose the same of some thousand scores with ties, in two chunks."""
    pre_BL = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 8).round().to(device)
    found = []
    for form in (KernelSlots, Slots):
        slots = form(500, *pre_BL.shape)
        for first in (0, 48):
            slots.add(Chunk(pre_BL[:, first : first + 48], pre_BL.new_full((48,), 0.5), 0, first))
        found.append(slots.largest(None))
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


class _KernelDigits:
    """`train.radix.Digits` of entries whose number is known to the device alone."""

    def __init__(self, entries: Entries, num_entries_1: Tensor, num_positions: int):
        self._entries, self._num_entries_1, self._last_position = entries, num_entries_1, num_positions - 1
        self._found = [torch.zeros_like(num_entries_1), torch.zeros_like(num_entries_1)]

    def counts(self, word: int, shift: int, width: int) -> Tensor:
        counts = self._num_entries_1.new_zeros(1 << width)
        score_N, _, position_N = self._entries
        _count[(triton.cdiv(len(score_N), BLOCK),)](
            score_N,
            position_N,
            self._num_entries_1,
            *self._found,
            counts,
            self._last_position,
            shift,
            width,
            OF_KEY=word == KEY,
            BLOCK=BLOCK,
        )
        return counts

    def narrow(self, word: int, shift: int, found_1: Tensor) -> None:
        self._found[word] = found_1


@triton.jit
def _key(score):
    """The bits of a score as an integer; 0 for scores <= 0."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits > 0, bits, 0)


@triton.jit
def _write_taken(taken, score, code, position, score_ptr, code_ptr, position_ptr, num_written_ptr):
    """Write the taken entries of a program to places of their own, `num_written` being the first free one."""
    first = tl.atomic_add(num_written_ptr, tl.sum(taken.to(tl.int64), 0))
    place = first + tl.cumsum(taken.to(tl.int64), 0) - 1
    tl.store(score_ptr + place, score, mask=taken)
    tl.store(code_ptr + place, code, mask=taken)
    tl.store(position_ptr + place, position, mask=taken)


@triton.jit
def _append(
    pre_ptr,
    scale_ptr,
    score_ptr,
    code_ptr,
    position_ptr,
    num_entries_ptr,
    bound_ptr,
    num_bad_ptr,
    num_columns,
    row_stride,
    column_stride,
    token_ptr,
    first_token,
    first_latent,
    num_latents,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    code = tl.load(pre_ptr + row * row_stride + column * column_stride, mask=inside, other=0.0).to(tl.float32)
    score = code * tl.load(scale_ptr + column, mask=inside, other=0.0)
    bad = tl.sum((inside & ~(tl.abs(score) < float("inf"))).to(tl.int64), 0)
    if bad > 0:
        tl.atomic_add(num_bad_ptr, bad)
    key, bound = _key(score), tl.load(bound_ptr)
    token = row + first_token if token_ptr is None else tl.load(token_ptr + row)
    position = token * num_latents + column + first_latent
    _write_taken(inside & (key >= bound), score, code, position, score_ptr, code_ptr, position_ptr, num_entries_ptr)


@triton.jit
def _count(
    score_ptr,
    position_ptr,
    num_entries_ptr,
    found_key_ptr,
    found_place_ptr,
    counts_ptr,
    last_position,
    shift,
    width,
    OF_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, num_entries = tl.program_id(0).to(tl.int64) * BLOCK, tl.load(num_entries_ptr)
    if start < num_entries:
        entry = start + tl.arange(0, BLOCK)
        agrees = entry < num_entries
        word, found = _key(tl.load(score_ptr + entry, mask=agrees, other=0.0)), tl.load(found_key_ptr)
        if not OF_KEY:
            agrees = agrees & (word == found)
            word = last_position - tl.load(position_ptr + entry, mask=agrees, other=0)
            found = tl.load(found_place_ptr)
        agrees = agrees & (word >> shift >> width == found >> shift >> width)
        digit = (word >> shift) & ((1 << width) - 1)
        tl.atomic_add(counts_ptr + digit, tl.full((BLOCK,), 1, tl.int64), mask=agrees)


@triton.jit
def _move(
    score_ptr,
    code_ptr,
    position_ptr,
    num_entries_ptr,
    cut_key_ptr,
    cut_position_ptr,
    to_score_ptr,
    to_code_ptr,
    to_position_ptr,
    num_moved_ptr,
    BLOCK: tl.constexpr,
):
    start, num_entries = tl.program_id(0).to(tl.int64) * BLOCK, tl.load(num_entries_ptr)
    if start < num_entries:
        entry = start + tl.arange(0, BLOCK)
        inside = entry < num_entries
        score = tl.load(score_ptr + entry, mask=inside, other=0.0)
        code = tl.load(code_ptr + entry, mask=inside, other=0.0)
        position = tl.load(position_ptr + entry, mask=inside, other=0)
        key, cut_key, cut_position = _key(score), tl.load(cut_key_ptr), tl.load(cut_position_ptr)
        taken = inside & (key > 0) & ((key > cut_key) | ((key == cut_key) & (position <= cut_position)))
        _write_taken(taken, score, code, position, to_score_ptr, to_code_ptr, to_position_ptr, num_moved_ptr)
