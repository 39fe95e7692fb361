"""Batches read ahead of the step: gathered by a thread into a ring of buffers, copied and decoded on the device.

One thread takes the batches in their order. For each it tells the data what the coming batches need, has what is new
fetched by `num_threads` others, gathers the rows into a free buffer and, on a GPU, starts the copy and the decoding on
a stream of its own: the step waits on the GPU, the host never. Shapes: B tokens (of this rank), M models, D width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extract.codecs import decode
from train.data import TrainingData
from train.lanes import Stretch
from train.stream import BatchStream

RING = 3  # buffers: one in the step, one that is ready, one that is filled
LOOK_S = 0.1  # seconds between looks at what a thread waits for, or at a request to stop


class Batch(NamedTuple):
    """A rank's tokens of a step, their numbers in the batch of all ranks (None where there is one rank), and the
    seconds that the host waited for them.
    """

    x_BMD: Tensor
    token_B: Tensor | None
    waited: float


class Loader:
    """Iterates over the batches of steps [start, stop), on `device`.

    x_BMD holds raw activations in the stored dtype, float32 where the codec has scales. On a CPU it is a buffer of the
    ring, valid until the next one is asked for. To be used once, in a `with` block, whose end stops all threads and
    gives up what they wait for. What goes wrong in one of them is raised where a batch is asked for. Once `is_stopping`
    says so, the batches end early rather than be waited for.
    """

    def __init__(
        self,
        stream: BatchStream,
        start: int,
        stop: int,
        device: torch.device,
        num_threads: int,
        is_stopping: Callable[[], bool] = lambda: False,
    ):
        self._stream, self._data, self._steps = stream, stream.data, range(start, stop)
        self._device, self._num_threads, self._is_stopping = device, num_threads, is_stopping
        self._pending: deque[tuple[HostSlot | DeviceSlot, Future[None]]] = deque()
        self._windows: list[Stretch] = []
        self._fetches: deque[Future[None]] = deque()

    def __enter__(self) -> Loader:
        self._gatherer = ThreadPoolExecutor(1, "gather")
        self._fetchers = ThreadPoolExecutor(self._num_threads, "fetch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fills = [filled for _, filled in self._pending]
        for threads, work in ((self._gatherer, fills), (self._fetchers, self._fetches)):
            begun = [future for future in work if not future.cancel()]
            while wait(begun, LOOK_S).not_done:
                self._data.expect([])  # again and again: what is under way may ask for more
            threads.shutdown()

    def is_ready(self) -> bool:
        """Whether the next batch would come at once, without an error."""
        return bool(self._pending) and self._pending[0][1].done() and self._pending[0][1].exception() is None

    def __iter__(self) -> Iterator[Batch]:
        steps = iter(self._steps)
        self._pending.extend(self._begin(self._slot(), step) for step in islice(steps, RING))
        while self._pending:
            slot, filled = self._pending[0]
            asked = time.perf_counter()
            while not wait([filled], LOOK_S).done:
                if self._is_stopping():
                    return
            filled.result()
            self._pending.popleft()
            x_BMD, token_B = slot.take()
            yield Batch(x_BMD, token_B, time.perf_counter() - asked)
            self._pending.extend(self._begin(slot, step) for step in islice(steps, 1))

    def _slot(self) -> HostSlot | DeviceSlot:
        return HostSlot(self._stream) if self._device.type == "cpu" else DeviceSlot(self._stream, self._device)

    def _begin(self, slot: HostSlot | DeviceSlot, step: int) -> tuple[HostSlot | DeviceSlot, Future[None]]:
        return slot, self._gatherer.submit(self._fill, slot, step)

    def _fill(self, slot: HostSlot | DeviceSlot, step: int) -> None:
        self._look_ahead(step)
        slot.read(self._stream.rows(step), self._stream.numbers(step) if self._stream.num_ranks > 1 else None)

    def _look_ahead(self, step: int) -> None:
        """When lanes reach new windows, tell the data what is read from now on, and have what is new fetched."""
        windows = self._stream.windows(step, self._steps.stop)
        if windows != self._windows:
            known, self._windows = set(self._windows), windows
            new = [window for window in windows if window not in known]
            self._data.expect([span for window in windows for span in self._stream.spans(window)])
            spans = (span for window in new for span in self._stream.spans(window))
            self._fetches.extend(self._fetchers.submit(self._data.fetch, span) for span in spans)
        while self._fetches and self._fetches[0].done():
            self._fetches.popleft().result()


class HostSlot:
    """A batch on a CPU: the buffer itself, or what its codes decode to."""

    def __init__(self, stream: BatchStream):
        self._data, self._raw = stream.data, stream.data.buffer(stream.num_own_tokens)
        self._decoded_ND = None if self._raw.scales_N is None else torch.empty(self._raw.codes_ND.shape)

    def read(self, rows_B: np.ndarray, number_B: np.ndarray | None) -> None:
        self._data.read(rows_B, self._raw)
        self._x_BMD = _by_token(decode(self._raw, self._decoded_ND), self._data)
        self._token_B = None if number_B is None else torch.from_numpy(number_B)

    def take(self) -> tuple[Tensor, Tensor | None]:
        return self._x_BMD, self._token_B


class DeviceSlot:
    """A batch on a GPU: a pinned buffer, the copy of which is decoded there, both on a stream beside the step's."""

    def __init__(self, stream: BatchStream, device: torch.device):
        self._data, self._raw = stream.data, stream.data.buffer(stream.num_own_tokens, pinned=True)
        self._number_B = torch.empty(stream.num_own_tokens, dtype=torch.int64, pin_memory=True)
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._copied, self._ready = torch.cuda.Event(), torch.cuda.Event()
        self._on_device: list[Tensor] = []

    def read(self, rows_B: np.ndarray, number_B: np.ndarray | None) -> None:
        self._copied.synchronize()  # the copy before may still read the buffers
        self._data.read(rows_B, self._raw)
        with torch.cuda.stream(self._stream):
            copied = self._raw.to(self._device)
            self._on_device = [] if number_B is None else [self._numbers(number_B)]
            self._copied.record()
            self._on_device.insert(0, _by_token(decode(copied), self._data))
            self._ready.record()

    def take(self) -> tuple[Tensor, Tensor | None]:
        """The step's stream waits for the batch, and its memory for the step."""
        step_stream = torch.cuda.current_stream(self._device)
        step_stream.wait_event(self._ready)
        for tensor in self._on_device:
            tensor.record_stream(step_stream)
        x_BMD, *token_B = self._on_device
        self._on_device = []
        return x_BMD, token_B[0] if token_B else None

    def _numbers(self, number_B: np.ndarray) -> Tensor:
        self._number_B.copy_(torch.from_numpy(number_B))
        return self._number_B.to(self._device, non_blocking=True)


def _by_token(x_ND: Tensor, data: TrainingData) -> Tensor:
    """Rows (B * M, D) as (B, M, D)."""
    return x_ND.view(-1, len(data.models), data.d_model)
