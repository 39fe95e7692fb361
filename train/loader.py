"""Batches read ahead of the step: gathered by a thread into a ring of buffers, copied and decoded on the device.

One thread takes the batches in their order. It has their source fill a free buffer and, on a GPU, starts the copy and
the decoding on a stream of its own: the step waits on the GPU, the host never. The source is a `Reading`, which tells
the data what the coming batches need, has what is new fetched by other threads, and gathers the rows; or what another
process reads for several, see `train.ring`. Shapes: B tokens (of this rank), M models, D width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from extract.codecs import Encoded, decode
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


class Source(Protocol):
    """What fills a loader's buffers; `read` is called by one thread, for one step after another."""

    def buffer(self, pinned: bool = False) -> Encoded | None:
        """Room for a batch; None, unless it is to be pinned, where batches come in memory of the source's."""

    def read(self, step: int, into: Encoded | None) -> Encoded:
        """The rank's batch of a step, in `into` if given. In memory of the source's it is valid until the batch `RING`
        steps later is read.
        """

    def give_up(self) -> None:
        """End the waits of a read that is under way: its batch is not wanted any more."""

    def close(self) -> None:
        """Give back threads and memory; nothing is read afterwards."""


class Reading:
    """Reads batches of a stream, up to step `stop`; `num_threads` threads fetch ahead what its data brings in parts."""

    def __init__(self, stream: BatchStream, stop: int, num_threads: int):
        self._stream, self._data, self._stop = stream, stream.data, stop
        self._windows: list[Stretch] = []
        self._fetches: deque[Future[None]] = deque()
        self._fetchers = ThreadPoolExecutor(num_threads, "fetch")

    def buffer(self, pinned: bool = False) -> Encoded:
        return self._data.buffer(self._stream.num_own_tokens, pinned)

    def read(self, step: int, into: Encoded | None) -> Encoded:
        assert into is not None  # a buffer was given
        self._look_ahead(step)
        self._data.read(self._stream.rows(step), into)
        return into

    def give_up(self) -> None:
        self._data.expect([])

    def close(self) -> None:
        begun = [fetched for fetched in self._fetches if not fetched.cancel()]
        while wait(begun, LOOK_S).not_done:
            self.give_up()  # again and again: what is under way may ask for more
        self._fetchers.shutdown()

    def _look_ahead(self, step: int) -> None:
        """When lanes reach new windows, tell the data what is read from now on, and have what is new fetched."""
        windows = self._stream.windows(step, self._stop)
        if windows != self._windows:
            known, self._windows = set(self._windows), windows
            new = [window for window in windows if window not in known]
            self._data.expect([span for window in windows for span in self._stream.spans(window)])
            spans = (span for window in new for span in self._stream.spans(window))
            self._fetches.extend(self._fetchers.submit(self._data.fetch, span) for span in spans)
        while self._fetches and self._fetches[0].done():
            self._fetches.popleft().result()


class Loader:
    """Iterates over the batches of steps [start, stop), on `device`: read here, unless another source is given.

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
        source: Source | None = None,
    ):
        self._stream, self._steps, self._device, self._is_stopping = stream, range(start, stop), device, is_stopping
        self._source = source or Reading(stream, stop, num_threads)
        self._pending: deque[tuple[HostSlot | DeviceSlot, Future[None]]] = deque()

    def __enter__(self) -> Loader:
        self._gatherer = ThreadPoolExecutor(1, "gather")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun = [filled for _, filled in self._pending if not filled.cancel()]
        while wait(begun, LOOK_S).not_done:
            self._source.give_up()  # again and again: what is under way may ask for more
        self._gatherer.shutdown()
        self._source.close()

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
        data, source = self._stream.data, self._source
        if self._device.type == "cpu":
            return HostSlot(source, data)
        return DeviceSlot(source, data, self._stream.num_own_tokens, self._device)

    def _begin(self, slot: HostSlot | DeviceSlot, step: int) -> tuple[HostSlot | DeviceSlot, Future[None]]:
        return slot, self._gatherer.submit(self._fill, slot, step)

    def _fill(self, slot: HostSlot | DeviceSlot, step: int) -> None:
        slot.read(step, self._stream.numbers(step) if self._stream.num_ranks > 1 else None)


class HostSlot:
    """A batch on a CPU: the buffer itself, or what its codes decode to."""

    def __init__(self, source: Source, data: TrainingData):
        self._source, self._data, self._raw = source, data, source.buffer()
        self._decoded_ND: Tensor | None = None

    def read(self, step: int, number_B: np.ndarray | None) -> None:
        encoded = self._source.read(step, self._raw)
        x_ND = decode(encoded, self._decoded_ND)
        self._decoded_ND = None if encoded.scales_N is None else x_ND
        self._x_BMD = _by_token(x_ND, self._data)
        self._token_B = None if number_B is None else torch.from_numpy(number_B)

    def take(self) -> tuple[Tensor, Tensor | None]:
        return self._x_BMD, self._token_B


class DeviceSlot:
    """A batch on a GPU: a pinned buffer, the copy of which is decoded there, both on a stream beside the step's."""

    def __init__(self, source: Source, data: TrainingData, num_tokens: int, device: torch.device):
        self._source, self._data, self._raw = source, data, source.buffer(pinned=True)
        self._number_B = torch.empty(num_tokens, dtype=torch.int64, pin_memory=True)
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._copied, self._ready = torch.cuda.Event(), torch.cuda.Event()
        self._on_device: list[Tensor] = []

    def read(self, step: int, number_B: np.ndarray | None) -> None:
        self._copied.synchronize()  # the copy before may still read the buffers
        encoded = self._source.read(step, self._raw)
        with torch.cuda.stream(self._stream):
            copied = encoded.to(self._device)
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
