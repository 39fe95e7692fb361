"""Rows of the weights on every rank, and whole weights for a step, by PyTorch's FSDP (`fully_shard`).

Bytes on each of R ranks, with N parameters of which products read p bytes each:

    always       rows of the float32 weights and of Adam's moments                    12 N / R
                 whole float32 gradients, which every rank has of its own tokens       4 N
    in a step    whole weights, gathered once                                          p N
    after it     rows of the summed gradients, by reduce-scatter in float32            4 N / R

A step reads weights outside of any module's forward, so it asks FSDP to gather and to free them; hooks never run, and
FSDP never sees a gradient. The gathered bytes arrive in the memory of the gradient, which is not wanted before they are
copied out. Validation and saving read the float32 weights in that memory itself: there is no gradient then. Decoder
norms are computed from float32 rows, so that selection ranks as one process does.

With engine.ranks_per_copy = R < number of ranks (HSDP), R consecutive ranks divide the rows among them, every R ranks
hold them all, and after the reduce-scatter R-th parts of gradients are summed between these copies.

Sources: FSDP arXiv 2304.11277, ZeRO arXiv 1910.02054. Shapes: L latents, M models, W = M * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from train.config import TrainSettings
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.initialisation import initialise
from train.optimiser import ClippedAdam
from train.pieces import Piece, SavedState
from train.placement import Share, Space
from train.products import Gradients, kernels_for
from train.ranks import Group, all_gather
from train.single import PRECISIONS
from train.world import World


class RowWeights:
    """The placement of engine=fsdp. Only a readable step makes the crosscoder's own weights whole; what products read
    of other steps, and in validation, is in the operands.
    """

    def __init__(self, settings: TrainSettings, space: Space, world: World):
        training, everyone = settings.training, world.everyone
        self._ranks, self._copies = world.split(settings.engine.ranks_per_copy or everyone.size)
        self.share = Share(settings.crosscoder.num_latents, everyone=everyone, tokens=everyone)
        self._space, self.crosscoder = space, space.crosscoder(settings.crosscoder, torch.device("cpu"))
        is_readable = training.step == "readable"
        self._precision = None if is_readable else PRECISIONS[training.precision]
        self._weights = self._divided(world.device)
        W_enc, b_enc, W_dec, b_dec = (weight.gradient for weight in self._weights.values())
        self.gradients = None if is_readable else Gradients(W_enc, b_enc, W_dec, b_dec)
        rows = {name: weight.rows for name, weight in self._weights.items()}
        self._adam = ClippedAdam(rows, training.adam_betas, training.max_grad_norm)
        self._summed: dict[str, Tensor] = {}

    def _divided(self, device: torch.device) -> dict[str, RowWeight]:
        """The weights by name, and the crosscoder on the device; whole weights are freed before they are divided."""
        mesh, narrow = mesh_of(self._ranks, self._copies, device), {"W_enc": self._precision}
        if kernels_for(torch.empty(0, device=device)):  # without, narrow operands of sparse products gain nothing
            narrow["W_dec"] = self._precision
        divided = {}
        for name in [name for name, _ in self.crosscoder.named_parameters()]:
            like = self.crosscoder.get_parameter(name).to("meta")
            delattr(self.crosscoder, name)
            divided[name] = RowWeight(like, mesh, self._ranks, device, narrow.get(name))
        self.crosscoder.to(device)
        for name, weight in divided.items():
            self.crosscoder.register_parameter(name, weight.parameter)
        return divided

    @contextmanager
    def whole(self, exact: bool = False) -> Iterator[Operands]:
        norms_LM = self._norms()
        if exact:
            yield self._operands({name: weight.whole() for name, weight in self._weights.items()}, norms_LM)
            return
        try:
            gathered: dict[str, Tensor] = {name: weight.gather() for name, weight in self._weights.items()}
            if self.gradients is None:
                self._differentiate_whole_weights()
            yield self._operands(gathered, norms_LM)
        finally:
            for name, weight in self._weights.items():
                weight.free()
                setattr(self.crosscoder, name, weight.parameter)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self) -> Tensor:
        self.crosscoder.zero_foreign_rows(self._weights["W_enc"].gradient, self._weights["W_dec"].gradient)
        for name, weight in self._weights.items():
            self._summed[name] = self._copies.sum(weight.gradient_rows(), "summing gradients of copies")
        norm = torch.nn.utils.get_total_norm(self._summed.values())
        total = self.share.everyone.sum(norm.double().square(), "the norm of the gradient")
        return (total / self._copies.size).sqrt().to(norm.dtype)

    def update(self, number: int, learning_rate: float, grad_norm: Tensor, skip: Tensor) -> None:
        self._adam.step(self._summed, number, learning_rate, grad_norm, skip)
        self._summed = {}

    @torch.no_grad()
    def initialise(self, x_BMD: Tensor, seed: int) -> None:
        encoder = self._weights["W_enc"]
        latents = range(encoder.first, encoder.first + len(encoder.rows))
        ours = self._space.crosscoder(self.crosscoder.config, torch.device("cpu"), latents)
        initialise(ours, x_BMD, seed)
        for name, weight in self._weights.items():
            values = ours.get_parameter(name)
            weight.rows.copy_(weight.own(values) if name == "b_dec" else values)

    def pieces(self) -> dict[str, Piece]:
        if self._copies.rank > 0:
            return {}
        return {name: weight.piece(rows) for name, (weight, rows) in self._tensors().items()}

    def load(self, saved: SavedState) -> None:
        for name, (weight, rows) in self._tensors().items():
            rows.copy_(saved.rows(name, weight.first, weight.first + len(rows)))

    def whole_crosscoder(self) -> Crosscoder | None:
        """Its weights lie where the gradients do, so they last until the next step."""
        rows = dict(self.crosscoder.named_parameters())
        instead = {id(rows[name]): nn.Parameter(weight.whole()) for name, weight in self._weights.items()}
        return deepcopy(self.crosscoder, dict[int, Any](instead)) if self.share.everyone.rank == 0 else None

    def _differentiate_whole_weights(self) -> None:
        """Have the crosscoder's own weights be the gathered ones, with gradients of zero."""
        for name, weight in self._weights.items():
            setattr(self.crosscoder, name, weight.parameter)
            weight.parameter.grad = weight.gradient.zero_()

    def _operands(self, gathered: dict[str, Tensor], norms_LM: Tensor) -> Operands:
        W_enc, b_enc, W_dec, b_dec = (gathered[name].detach() for name in self._weights)
        return Operands(W_enc, b_enc.to(W_enc.dtype), W_dec, b_dec, self.crosscoder.latent_scale(norms_LM))

    def _norms(self) -> Tensor:
        """Decoder norms (L, M) of the float32 rows."""
        decoder = self._weights["W_dec"]
        rows_RMD = decoder.rows.view(-1, self.crosscoder.num_models, self.crosscoder.d_model)
        return decoder.gather_rows(rows_RMD.norm(dim=2), "gathering decoder norms")

    def _tensors(self) -> dict[str, tuple[RowWeight, Tensor]]:
        """Rows of weights and moments as they are called in a state, each with the weight that divides them."""
        rows = {f"crosscoder.{name}": (weight, weight.rows) for name, weight in self._weights.items()}
        moments = {f"adam.{name}": moment for name, moment in self._adam.moments().items()}
        return rows | {name: (self._weights[name.split(".")[1]], moment) for name, moment in moments.items()}


class RowWeight:
    """One weight, (n, ...): this rank's rows, and all of them while it is gathered.

    Attributes:
        rows: of the master weight, on this rank; maybe none. `first`: number of the first.
        gradient: the whole gradient of this rank's tokens, (n, ...). Gathering anything of the weight overwrites it.
    """

    def __init__(self, like: Tensor, mesh: DeviceMesh, ranks: Group, device: torch.device, dtype: torch.dtype | None):
        """`like` has the shape and dtype of the master weight, which the group `ranks` divides; what is gathered is of
        another `dtype`, if one is given.
        """
        self._module = nn.Module()
        self._module.weight = nn.Parameter(torch.empty_like(like, device="meta"))
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        self._fsdp: FSDPModule = fully_shard(self._module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        self._module.to_empty(device=device)
        self.rows = cast(DTensor, self._module.weight.detach()).to_local().zero_()
        self._ranks, self.num_rows = ranks, len(like)
        rows_each = -(-self.num_rows // ranks.size)  # the last ranks have fewer, or none
        self.first = min(ranks.rank * rows_each, self.num_rows)
        self._padded = torch.zeros(ranks.size * rows_each, *like.shape[1:], dtype=like.dtype, device=device)
        self.gradient = self._padded[: self.num_rows]
        self._fsdp.set_custom_all_gather(cast(Any, _GatherInto(self._padded, ranks)))

    @property
    def parameter(self) -> nn.Parameter:
        """What stands for the weight: whole and plain while gathered, else rows that only FSDP may read."""
        return cast(nn.Parameter, self._module.weight)

    def gather(self) -> nn.Parameter:
        """The whole weight in the dtype that is gathered, until `free`."""
        self._fsdp.unshard()
        return self.parameter

    def free(self) -> None:
        """End `gather`, if there was one."""
        self._fsdp.reshard()

    def whole(self) -> Tensor:
        """The whole master weight, in the memory of the gradient."""
        place = self._padded.chunk(self._ranks.size)[self._ranks.rank]
        place[: len(self.rows)] = self.rows
        return self._ranks.gather(place, "gathering master weights", self._padded)[: self.num_rows]

    def gradient_rows(self) -> Tensor:
        """The sum over ranks of the gradient, on this rank's rows."""
        return self._ranks.sum_parts(self._padded, "summing gradients")[: len(self.rows)]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor."""
        return whole[self.first : self.first + len(self.rows)]

    def gather_rows(self, rows: Tensor, what: str) -> Tensor:
        """All rows of a small tensor that is divided as the weight is, from this rank's."""
        rows_each = len(self._padded) // self._ranks.size
        padded = rows.new_zeros(rows_each, *rows.shape[1:])
        padded[: len(rows)] = rows
        return self._ranks.gather(padded, what)[: self.num_rows]

    def piece(self, rows: Tensor) -> Piece:
        return Piece(rows, self.first, self.num_rows)


class _GatherInto:
    """FSDP's all-gather, with its output in memory that is there already."""

    def __init__(self, memory: Tensor, ranks: Group):
        self._memory, self._ranks = memory, ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._memory.flatten().view(dtype)[: size[0]]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        with self._ranks.watch("gathering weights"):
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def mesh_of(ranks: Group, copies: Group, device: torch.device) -> DeviceMesh:
    """What FSDP divides over: the ranks of a copy, and, where there are several, copies."""
    if not dist.is_initialized():  # one process, started without torchrun
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if copies.size == 1:
        return DeviceMesh.from_group(_process_group(ranks), device.type, mesh_dim_names=("ranks",))
    numbers = torch.arange(copies.size * ranks.size).view(copies.size, ranks.size)
    groups = [_process_group(copies), _process_group(ranks)]
    return DeviceMesh.from_group(groups, device.type, mesh=numbers, mesh_dim_names=("copies", "ranks"))


def _process_group(group: Group) -> dist.ProcessGroup:
    """A group's own, or that of all ranks, or one for a single rank."""
    everyone = dist.group.WORLD if group.size == dist.get_world_size() else None
    return group.process_group or everyone or dist.new_group([dist.get_rank()], use_local_synchronization=True)
