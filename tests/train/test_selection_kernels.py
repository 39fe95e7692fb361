"""The Triton kernels of the selection against a stable sort: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

selection_kernels = pytest.importorskip("train.selection_kernels")

from test_batch_topk import CASES, L, check, places, sorted_places  # noqa: E402

from train import batch_topk  # noqa: E402
from train.batch_topk import Selected, Selection  # noqa: E402
from train.candidates import Chunk  # noqa: E402
from train.slots import Slots  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OTHER_DTYPES = ("fp16", "fp64", "fp64, apart by less than fp32 tells", "bf16")  # chosen by `train.slots`
INEXACT = () if torch.cuda.is_available() else ("bf16 denormals",)  # the interpreter alters them when it reads bf16
NARROW = [name for name in CASES if name not in OTHER_DTYPES + INEXACT]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(selection_kernels, "BLOCK", 256)


def streamed(pre_BL, scale_L, num_selected, chunk):
    """What the kernels choose from chunks of latents, each overwritten once it was added."""
    slots, finite = selection_kernels.KernelSlots(num_selected, *pre_BL.shape), True
    for first in range(0, pre_BL.shape[1], chunk):
        buffer = pre_BL[:, first : first + chunk].clone().to(DEVICE)
        finite &= bool(slots.add(Chunk(buffer, scale_L[first : first + chunk].to(DEVICE), 0, first)))
        buffer.fill_(1e9)
    return selected(slots.largest(None), pre_BL.shape[1], finite)


def selected(entries, num_latents, finite=True):
    score, code, position = (column.cpu() for column in entries)
    return Selected(Selection(position // num_latents, position % num_latents), code, score, torch.tensor(finite))


@pytest.mark.parametrize("name", NARROW)
def test_equals_a_full_sort(name):
    pre_BL, scale_L = CASES[name]
    for num_selected, chunk in ((7, L), (131, 16), (5000, 27)):
        check(streamed(pre_BL, scale_L, num_selected, chunk), pre_BL, scale_L, num_selected, fixed_size=True)


def test_chunks_with_gaps_that_grow():
    pre_BL = torch.randn(12, 90, generator=torch.Generator().manual_seed(0))[:, ::3]
    slots = selection_kernels.KernelSlots(20, 12, 30)
    for first, end in ((0, 3), (3, 10), (10, 30)):
        slots.add(Chunk(pre_BL[:, first:end].to(DEVICE), torch.ones(end - first, device=DEVICE), 0, first))
    check(selected(slots.largest(None), 30), pre_BL, torch.ones(30), 20, fixed_size=True)


def test_positions_beyond_32_bits():
    num_tokens, num_latents = 1 << 33, 1 << 17
    slots = selection_kernels.KernelSlots(3, num_tokens, num_latents)
    ones = torch.ones(2, device=DEVICE)
    slots.add(Chunk(ones[None], ones, num_tokens - 1, num_latents - 2))
    slots.add(Chunk(torch.tensor([[1.0, 2.0]], device=DEVICE), ones, 1 << 32, 70_000))
    assert places(selected(slots.largest(None), num_latents).selection) == [
        (1 << 32, 70_000),
        (1 << 32, 70_001),
        (num_tokens - 1, num_latents - 2),
    ]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["code", "scale"])
def test_scores_that_are_not_finite_are_reported(bad, where):
    pre_BL, scale_L = torch.rand(4, 6), torch.rand(6)
    (pre_BL[2] if where == "code" else scale_L)[3] = bad
    assert not streamed(pre_BL, scale_L, 3, 4).finite


def test_both_halves_of_a_matrix_have_the_cut_of_the_whole():
    """Two holders of every second token, whose counts are summed: what two ranks do."""
    pre_BL, scale_L = CASES["ties everywhere"]
    halves = [selection_kernels.KernelSlots(200, *pre_BL.shape) for _ in range(2)]
    for token, row_1L in enumerate(pre_BL.split(1)):
        halves[token % 2].add(Chunk(row_1L.to(DEVICE), scale_L.to(DEVICE), token, 0))
    barrier, counted = threading.Barrier(2), {}

    def all_reduce(counts):
        counted[threading.get_ident()] = counts.clone()
        barrier.wait()
        counts.copy_(sum(counted.values()))
        barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda half: half.largest(all_reduce), halves))
    chosen = [place for entries in found for place in entries.position[entries.score > 0].tolist()]
    assert [divmod(place, L) for place in sorted(chosen)] == sorted_places(pre_BL * scale_L, 200)
    assert not {place // L % 2 for place in found[0].position[found[0].score > 0].tolist()} - {0}


@pytest.mark.parametrize("name", ["ties everywhere", "all equal", "normal"])
def test_rows_have_numbers(name):
    """Rows in reverse are chosen, and numbered, as in their own order."""
    pre_BL, scale_L = CASES[name]
    slots, number_B = selection_kernels.KernelSlots(131, *pre_BL.shape), torch.arange(len(pre_BL)).flip(0)
    for first in (0, 25):
        columns = slice(first, first + 25)
        pre_BC, scale_C = pre_BL.flip(0)[:, columns].to(DEVICE), scale_L[columns].to(DEVICE)
        slots.add(Chunk(pre_BC, scale_C, 0, first, number_B.to(DEVICE)))
    check(selected(slots.largest(None), L), pre_BL, scale_L, 131, fixed_size=True)


def test_the_small_case_that_decides_about_a_gpu():
    assert selection_kernels.agree_with_torch(DEVICE)


@pytest.mark.parametrize(
    ("capability", "replacement", "said"),
    [
        ((7, 5), None, "compute capability"),
        ((9, 0), lambda device: False, "choose other scores"),
        ((9, 0), lambda device: 1 / 0, "do not run"),
        ((9, 0), None, None),
    ],
)
def test_a_gpu_without_working_kernels_falls_back_and_says_so_once(monkeypatch, caplog, capability, replacement, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if replacement is not None:
        monkeypatch.setattr(selection_kernels, "agree_with_torch", replacement)
    batch_topk._slots_on.cache_clear()
    found = [batch_topk._slots_on(DEVICE) for _ in range(3)]
    batch_topk._slots_on.cache_clear()
    assert found == [selection_kernels.KernelSlots if said is None else Slots] * 3
    assert len(caplog.records) == (said is not None)
    assert said is None or said in caplog.text
