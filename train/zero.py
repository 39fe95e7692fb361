"""Moments, gradients and weights divided over ranks by DeepSpeed's ZeRO, stages 1, 2 and 3.

DeepSpeed keeps the weights (stage 3: each rank a part), sums gradients over ranks, has Adam update each rank's part and
gathers the weights. It sees one gradient a step, the sum over this rank's micro-batches, and no forward pass: a step
reads the weights where DeepSpeed has gathered them. So gradients are summed in float32 on every rank, then once over
ranks, in stage 3 weights are gathered once, and none of DeepSpeed's module hooks has a part in a result.

Bytes on each of R ranks, with N parameters of which products read p bytes each:

                                                     stages 1 and 2            stage 3
    always       weights, which Adam writes          4 N                       4 N / R
                 Adam's moments                      8 N / R                   8 N / R
                 gradients of this rank's tokens     4 N                       4 N
    in a step    whole weights                       0, or p N if not 4        p N
    after it     parts of summed gradients           in place; 4 N / R in      4 N / R
                                                     the update

Every rank has whole gradients of its own tokens, so stages 1 and 2 need the same. A readable step has autograd make
them anew, and stages 1 and 2 copy of them what this rank updates. With engine.offload_optimizer moments lie in the
memory of the host, and so do weights of their own for Adam.

Sources: ZeRO (arXiv 1910.02054), ZeRO-Offload (arXiv 2101.06840). Shapes: L latents, M models, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from train.config import TrainingConfig, TrainSettings
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.initialisation import initialise
from train.optimiser import MOMENTS
from train.pieces import Piece, SavedState
from train.placement import Share, Space
from train.products import Gradients, kernels_for
from train.single import PRECISIONS
from train.world import World
from train.zero_config import deepspeed_config
from train.zero_library import PartAdam, deepspeed_on, module_of


class ZeroWeights:
    """The placement of engine=deepspeed. BadInput where DeepSpeed is missing, or for a file that it cannot follow."""

    def __init__(self, settings: TrainSettings, space: Space, world: World):
        engine, training = settings.engine, settings.training
        config = deepspeed_config(engine.zero_stage, engine.offload_optimizer, engine.deepspeed_json)
        self._deepspeed = deepspeed_on(world.device)
        world.limit(self._deepspeed.utils.groups._clone_world_group())
        self._device, self._everyone = world.device, world.everyone
        self._stage, self._offloads = engine.zero_stage, engine.offload_optimizer
        self.share = Share(settings.crosscoder.num_latents, everyone=world.everyone, tokens=world.everyone)
        self.crosscoder = space.crosscoder(settings.crosscoder, world.device)
        self._shapes = [weight.shape for weight in self.crosscoder.parameters()]
        self._flat = self._gradient_memory() if training.step == "sparse" else None
        self.gradients = None if self._flat is None else _gradients(self._flat, self._shapes)
        self._narrow = _narrow(training, world.device)
        self._has_gradient = False
        self._module = module_of(self.crosscoder)
        self._adam = PartAdam(self._module.parameters(), training.adam_betas, training.max_grad_norm)
        place = SimpleNamespace(device_rank=world.device.index or 0)
        self._engine, *_ = self._deepspeed.initialize(place, self._module, self._adam, config=config)
        # Clipping is ours, and DeepSpeed would take the norm of a float64 copy of the summed gradients.
        self._engine.optimizer.get_grad_norm_direct = lambda *of_part: torch.zeros(())
        if not self._offloads:
            self._share_masters()
        self._make_moments()

    @contextmanager
    def whole(self, exact: bool = False) -> Iterator[Operands]:
        self.crosscoder.zero_grad()
        self._has_gradient = False
        with self._operands({} if exact else self._narrow) as operands:
            yield operands
        if self._has_gradient:
            self._sum_gradients(self._gradients())

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's sum over ranks is a mean, so that what is summed is too large by the number of ranks."""
        (loss * self._everyone.size).backward()
        self._has_gradient = True

    def reduce(self) -> Tensor:
        """The gradients have been summed at the end of `whole`."""
        norm = torch.nn.utils.get_total_norm(self._gradient_parts()).to(self._device)
        return self._everyone.sum(norm.double().square(), "the norm of the gradient").sqrt().to(norm.dtype)

    def update(self, number: int, learning_rate: float, grad_norm: Tensor, skip: Tensor) -> None:
        self._adam.prepare(number, learning_rate, grad_norm, skip)
        with self._everyone.watch("updating and gathering weights"):
            self._engine.step()
        self._hold_summed(False)

    def initialise(self, x_BMD: Tensor, seed: int) -> None:
        with self._gathered(*self._module.parameters(), changed=True):
            initialise(self.crosscoder, x_BMD, seed)
        self._engine.optimizer.refresh_fp32_params()

    def pieces(self) -> dict[str, Piece]:
        pieces = {f"crosscoder.{name}": self._piece(self._whole_weight(weight)) for name, weight in self._weights()}
        for name, weight in self._weights():
            for moment in MOMENTS:
                pieces[f"adam.{name}.{moment}"] = self._piece(self._whole_moment(weight, moment))
        return pieces

    def load(self, saved: SavedState) -> None:
        for name, weight in self._weights():
            with self._gathered(weight, changed=True), torch.no_grad():
                weight.copy_(saved.rows(f"crosscoder.{name}"))
            for moment in MOMENTS:
                self._load_moment(weight, moment, saved.rows(f"adam.{name}.{moment}"))
        self._engine.optimizer.refresh_fp32_params()

    def whole_crosscoder(self) -> Crosscoder | None:
        ours, is_first = self.crosscoder, self._everyone.rank == 0
        space = Space(ours.models, ours.d_model, ours.hookpoint, ours.activation_mean, ours.activation_scale)
        crosscoder = space.crosscoder(ours.config, torch.device("cpu")) if is_first else None
        for name, weight in self._weights():
            whole = self._whole_weight(weight)
            if crosscoder is not None:
                crosscoder.get_parameter(name).data.copy_(whole)
        return crosscoder

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._module.named_parameters()

    @contextmanager
    def _gathered(self, *weights: nn.Parameter, changed: bool = False) -> Iterator[None]:
        """While it is open, weights are whole, and the crosscoder's are the same memory; `changed` ones are kept.

        One is gathered after another, for DeepSpeed makes a copy of what it gathers at a time.
        """
        gather = partial(self._deepspeed.zero.GatheredParameters, modifier_rank=0 if changed else None)
        with ExitStack() as stack:
            with self._everyone.watch("gathering weights"):
                for weight in weights:
                    stack.enter_context(gather([weight]))
            self._show_weights()
            yield
        self._show_weights()

    @contextmanager
    def _operands(self, narrow: dict[str, torch.dtype]) -> Iterator[Operands]:
        """What products read. Of a `narrow` weight that is a copy, beside which the weight does not stay whole."""
        read: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, weight in self._weights():
                with ExitStack() as gathered:
                    gathered.enter_context(self._gathered(weight))
                    read[name] = weight.detach().to(narrow.get(name, weight.dtype))
                    if name == "W_dec":
                        scale_L = self.crosscoder.latent_scale()
                    if name not in narrow:
                        stack.push(gathered.pop_all())
            operands = Operands(**read, scale_L=scale_L)
            del read
            yield operands
            vars(operands).clear()  # a step that still holds them holds no whole weights

    def _show_weights(self) -> None:
        """Have the crosscoder's weights be what DeepSpeed holds now: whole, or in stage 3 empty."""
        for name, weight in self._weights():
            self.crosscoder.get_parameter(name).data = weight.data

    def _gradients(self) -> list[Tensor | None]:
        """The whole gradients of this rank's share of the loss."""
        return list(self.gradients[:4]) if self.gradients else [weight.grad for weight in self.crosscoder.parameters()]

    def _sum_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Have DeepSpeed sum whole gradients over ranks, in place, and keep each rank's part."""
        self._hold_summed(True)
        self._offer_place()
        for (_, weight), gradient in zip(self._weights(), gradients, strict=True):
            assert gradient is not None
            if gradient.ndim == 2:
                self.crosscoder.zero_foreign_rows(gradient)
            if self._stage == 3:  # a gradient has the shape of its weight, which need not be there
                weight.data = gradient.new_empty(()).expand_as(gradient)
            weight.grad = gradient.detach()  # an alias, which DeepSpeed may point elsewhere
        with self._everyone.watch("summing gradients"), self._engine.coalesce_grad_reduction():
            pass
        if self._stage == 3:
            for _, weight in self._weights():
                weight.data = weight.new_empty(0)
            self._join_summed()

    def _gradient_parts(self) -> list[Tensor]:
        """This rank's part of the summed gradient."""
        zero = self._engine.optimizer
        if self._stage == 3:
            return [part for parts in zero.get_fp32_grad_partitions().values() for part in parts.values()]
        if self._offloads:
            return [part.grad for part in zero.single_partition_of_fp32_groups]
        return [part for parts in zero.averaged_gradients.values() for part in parts]

    def _gradient_memory(self) -> Tensor:
        """Zeros for the whole gradients, one after another as DeepSpeed orders weights."""
        return torch.zeros(sum(shape.numel() for shape in self._shapes), device=self._device)

    def _share_masters(self) -> None:
        """Have Adam write DeepSpeed's weights, which are in float32 already, and not a copy of this rank's part."""
        zero = self._engine.optimizer
        if self._stage == 3:
            parts = zero.fp16_partitioned_groups_flat
        else:
            parts = [of_ranks[self._everyone.rank] for of_ranks in zero.parallel_partitioned_bit16_groups]
        masters = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for master, part in zip(masters, parts, strict=True):
            master.data = part.detach()
        zero._link_all_hp_params()

    def _hold_summed(self, held: bool) -> None:
        """In stage 3, have memory for the parts of summed gradients only while there are any."""
        if self._stage == 3 and not self._offloads:
            parts = self._engine.optimizer.grad_partitions_flat_buffer
            parts.untyped_storage().resize_(parts.nbytes if held else 0)
            if held:
                parts.zero_()  # what pads them

    def _join_summed(self) -> None:
        """Parts of summed gradients lie together already: as one tensor, DeepSpeed need not join them in a copy."""
        zero = self._engine.optimizer
        if not self._offloads:
            parts = zero.grad_partitions_flat_buffer.split(zero.fp16_partitioned_groups_flat_numel)
            zero.averaged_gradients.update({number: [part] for number, part in enumerate(parts)})

    def _offer_place(self) -> None:
        """Stages 1 and 2 copy the summed gradients of a rank's weights together: they lie so already."""
        zero = self._engine.optimizer
        if self._stage < 3 and self._flat is not None and zero.params_in_partition[0]:
            weights = list(self._module.parameters())
            number = next(i for i, weight in enumerate(weights) if weight is zero.params_in_partition[0][0])
            first = sum(shape.numel() for shape in self._shapes[:number])
            zero.grads_in_partition, zero.grads_in_partition_offset = self._flat[first:], 0

    def _make_moments(self) -> None:
        """DeepSpeed links moments to weights in the first update; one by zero gradients changes nothing else."""
        memory = self._gradient_memory() if self._flat is None else self._flat
        self._sum_gradients(_gradients(memory, self._shapes)[:4])
        zero = torch.zeros((), device=self._device)
        self.update(1, 0.0, zero, zero > 0)

    def _piece(self, whole: Tensor) -> Piece:
        """This rank's rows of a tensor, copied to the CPU, so that one whole tensor is there at a time."""
        rows_each = -(-len(whole) // self._everyone.size)  # the last ranks may have fewer, or none
        first = min(self._everyone.rank * rows_each, len(whole))
        return Piece(whole[first : first + rows_each].clone().cpu(), first, len(whole))

    def _whole_weight(self, weight: nn.Parameter) -> Tensor:
        with self._everyone.watch("gathering a weight"):
            return self._deepspeed.utils.safe_get_full_fp32_param(weight)

    def _whole_moment(self, weight: nn.Parameter, moment: str) -> Tensor:
        with self._everyone.watch("gathering a moment"):
            return self._deepspeed.utils.safe_get_full_optimizer_state(weight, moment)

    def _load_moment(self, weight: nn.Parameter, moment: str, whole: Tensor) -> None:
        if self._stage < 3:
            self._deepspeed.utils.safe_set_full_optimizer_state(weight, whole, moment)
            return
        # DeepSpeed's function for whole moments fails where ranks do not divide their size.
        size = -(-whole.numel() // self._everyone.size)
        part = torch.zeros(size)
        values = whole.flatten()[self._everyone.rank * size :][:size]
        part[: len(values)] = values
        self._deepspeed.utils.safe_set_local_optimizer_state(weight, part, moment)


def _narrow(training: TrainingConfig, device: torch.device) -> dict[str, torch.dtype]:
    """The dtype of operands that are copies. Without kernels, narrow operands of sparse products would gain nothing."""
    precision = PRECISIONS[training.precision]
    if precision is None or training.step == "readable":
        return {}
    return dict.fromkeys(
        ("W_enc", "b_enc", "W_dec") if kernels_for(torch.empty(0, device=device)) else ("W_enc", "b_enc"), precision
    )


def _gradients(memory: Tensor, shapes: Sequence[torch.Size]) -> Gradients:
    """The gradients of the weights, one after another in flat memory."""
    parts = memory.split([shape.numel() for shape in shapes])
    W_enc, b_enc, W_dec, b_dec = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return Gradients(W_enc, b_enc, W_dec, b_dec)
