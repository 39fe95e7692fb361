"""Bytes that one process sends to the others: as its sockets count them, and as collectives in a ring would."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where Linux keeps tcpi_bytes_sent in struct tcp_info (linux/tcp.h).
BYTES_SENT = slice(200, 208)
# What a rank of R sends in a ring, as a multiple of (R - 1) / R of the bytes of the whole: the kind of an operation,
# which of its arguments is the whole, and the multiple.
IN_A_RING = {
    "c10d::allreduce_": ("all-reduce", 0, 2),
    "c10d::_allgather_base_": ("gather", 0, 1),
    "c10d::allgather_": ("gather", 0, 1),
    "c10d::allgather_into_tensor_coalesced_": ("gather", 0, 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1, 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 1),
    "c10d::reduce_": ("reduce", 0, 1),
    "c10d::broadcast_": ("broadcast", 0, 1),
}
SILENT = "c10d::barrier"


def sent_by_sockets() -> int:
    """Bytes that this process has sent over TCP connections that are open now."""
    descriptors = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    return sum(_sent_by(descriptor) for descriptor in descriptors)


def _sent_by(descriptor: int) -> int:
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:  # no socket, or closed meanwhile
        return 0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT.stop)
        return int(struct.unpack("Q", info[BYTES_SENT])[0])
    except OSError:  # not of TCP
        return 0
    finally:
        connection.detach()  # others use it


class RingTraffic(TorchDispatchMode):
    """While it is entered, `sent` collects the bytes that this rank's collectives send if each goes around a ring, by
    kind: all-reduce, gather, reduce-scatter, reduce, broadcast. A library may do otherwise: gloo reduces whole tensors
    where a part is asked for. KeyError for an operation that is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name.startswith("c10d::") and name != SILENT:
            kind, which, times = IN_A_RING[name]
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            size = dist.ProcessGroup.unbox(groups[0]).size()
            self.sent[kind] += times * (size - 1) / size * _bytes(args[which])
        return function(*args, **(kwargs or {}))


def _bytes(tensors: Tensor | Iterable[Any]) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(_bytes(part) for part in tensors)
