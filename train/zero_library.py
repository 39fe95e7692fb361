"""DeepSpeed as a library: how it is imported, what it is handed, and the Adam that it calls."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from extract.errors import BadInput
from train.crosscoder import Crosscoder
from train.optimiser import MOMENTS, update


class PartAdam(torch.optim.Optimizer):
    """What DeepSpeed calls to update this rank's parts of the weights: `train.optimiser` with what `prepare` told."""

    def __init__(self, weights: Iterable[nn.Parameter], betas: list[float], max_norm: float):
        super().__init__(weights, {"lr": 0.0})
        self._betas, self._max_norm = (betas[0], betas[1]), max_norm
        self.prepare(1, 0.0, torch.zeros(()), torch.zeros((), dtype=torch.bool))

    def prepare(self, number: int, learning_rate: float, grad_norm: Tensor, skip: Tensor) -> None:
        """The arguments of `ClippedAdam.step` for the next `step`."""
        self._number, self._learning_rate, self._grad_norm, self._skip = number, learning_rate, grad_norm, skip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in (part for group in self.param_groups for part in group["params"]):
            moments = self.state[part]
            if not moments:
                moments.update({name: torch.zeros_like(part, requires_grad=False) for name in MOMENTS})
            skip, norm = self._skip.to(part.device), self._grad_norm.to(part.device)
            divisor = (norm / self._max_norm).clamp(min=1.0)
            both = [moments["exp_avg"]], [moments["exp_avg_sq"]]
            update([part], [part.grad], both, self._number, self._learning_rate, self._betas, divisor, skip)


def deepspeed_on(device: torch.device) -> ModuleType:
    """DeepSpeed for training on `device`; BadInput where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise BadInput(
            f"engine=deepspeed needs DeepSpeed, which cannot be imported ({error}): pip install 'crossdiff[deepspeed]'."
        ) from error
    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise BadInput(f"DeepSpeed {deepspeed.__version__} is too old: pip install -U 'crossdiff[deepspeed]'.")
    # No operator that DeepSpeed would compile is used here, and looking for them starts a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    # Its warnings are about what is chosen here, and those of torch about names that it uses.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # it takes up what torch.distributed has
    _forget_former_ranks(deepspeed.utils.groups)
    return deepspeed


def _forget_former_ranks(groups: ModuleType) -> None:
    """DeepSpeed keeps its copy of the group of all ranks, also of a run that ended in this process."""
    try:
        dist.get_global_rank(groups._clone_world_group(), 0)
    except ValueError:
        groups._release_process_group_references()


def module_of(crosscoder: Crosscoder) -> nn.Module:
    """A module with the weights of a crosscoder and no forward."""
    module = nn.Module()
    for name, weight in crosscoder.named_parameters():
        module.register_parameter(name, nn.Parameter(weight.detach()))
    return module
