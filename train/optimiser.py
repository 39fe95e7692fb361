"""Adam (arXiv 1412.6980) under a global gradient clip, without waiting for the device.

    g = gradient * min(1, max_norm / norm)
    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The clip and whether to skip the step are read on the device. The norm is that of the whole gradient, so each rank can
update the rows that it has. Where Adam writes rows of W_enc or W_dec, a kernel makes on the way what the next step
reads of them: the copy in lower precision and the decoder norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from train.products import kernels_for

EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class Written(NamedTuple):
    """What is made of the updated rows (L, W) of a weight: `copy_LW`, maybe the weight itself, and maybe their norms
    for each model.
    """

    copy_LW: Tensor
    norms_LM: Tensor | None = None


class ClippedAdam:
    """The moments of some weights, or of rows of them, and their update.

    Attributes:
        first, second: the moments by name, in float32 where the weights are.
        writes: whether what `written` holds is made by `step`, as on a GPU; else it is the caller's to make.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        betas: Sequence[float],
        max_norm: float,
        written: dict[str, Written] | None = None,
    ):
        self._weights, self._betas, self._max_norm = weights, (betas[0], betas[1]), max_norm
        self._written = written or {}
        self.first = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        self._kernels = kernels_for(weights[next(iter(self._written))]) if self._written else None
        self.writes = self._kernels is not None

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], number: int, learning_rate: float, norm: Tensor, skip: Tensor) -> None:
        """Update `number`, counted from 1, by gradients of global norm `norm`, unless `skip` (both on the device).

        The gradients mean nothing afterwards.
        """
        divisor = (norm / self._max_norm).clamp(min=1.0)
        plain = [name for name in self._weights if not (self.writes and name in self._written)]
        update(
            [self._weights[name] for name in plain],
            [gradients[name] for name in plain],
            ([self.first[name] for name in plain], [self.second[name] for name in plain]),
            number,
            learning_rate,
            self._betas,
            divisor,
            skip,
        )
        if self._kernels is not None:
            rates_4 = self._rates(number, learning_rate, divisor, skip)
            for name, written in self._written.items():
                moments = self.first[name], self.second[name]
                self._kernels.adam_rows(
                    self._weights[name], gradients[name], *moments, rates_4, self._betas, EPSILON, *written
                )

    def moments(self) -> dict[str, Tensor]:
        """All moments by name, `W_enc.exp_avg`, `W_enc.exp_avg_sq`, ..."""
        both = zip(MOMENTS, (self.first, self.second), strict=True)
        return {f"{name}.{moment}": tensor for moment, tensors in both for name, tensor in tensors.items()}

    def _rates(self, number: int, learning_rate: float, divisor: Tensor, skip: Tensor) -> Tensor:
        """(4,) on the device: lr / (1 - b1^t), 1 / sqrt(1 - b2^t), 1 / divisor, and 1 to skip."""
        first, second = (1 - beta**number for beta in self._betas)
        known = [torch.full((), value, device=divisor.device) for value in (learning_rate / first, second**-0.5)]
        return torch.stack([*known, 1 / divisor, skip.float()])


def update(
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    number: int,
    learning_rate: float,
    betas: tuple[float, float],
    divisor: Tensor,
    skip: Tensor,
) -> None:
    """torch's fused Adam, update `number` from 1 on, by gradients / divisor, on tensors that lie on one device."""
    adam(
        weights,
        gradients,
        *moments,
        [],
        [torch.full((), number - 1.0, device=weight.device) for weight in weights],
        fused=True,
        grad_scale=divisor.float(),
        found_inf=skip.float(),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )
