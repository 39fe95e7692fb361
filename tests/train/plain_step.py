"""A training step written from its definition: dense autograd, torch's sort, clipping and Adam, in one process.

    pre    = ReLU(x W_enc^T + b_enc),  s_j = sum_m ||W_dec[j, m]||
    recons = P W_dec + b_dec, where P holds the k * B largest pre * s that are positive
    loss   = mean_tm ||e_m|| + auxk_alpha * ||e - e_hat||^2 / ||e - mean_t e||^2 + delta_weight * mean_t ||e_1 - e_0||

It shares no code with what it tests. Shapes: B tokens, M models, D width, L latents, Z dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass
class Outcome:
    """What a step leaves: numbers, the (token, latent) pairs that survived, gradients before the clip, counters."""

    numbers: dict[str, float]
    selected: frozenset[tuple[int, int]]
    gradients: dict[str, Tensor]
    silent: list[int]


class PlainRun:
    """Steps in float64 from given weights, the first ones of a run."""

    def __init__(self, settings, weights, mean_MD, scale_M):
        self.config, self.training = settings.crosscoder, settings.training
        self.mean_MD, self.scale_M = mean_MD.double(), scale_M.double()
        self.weights = {name: weights[name].double().clone().requires_grad_() for name in WEIGHTS}
        self.adam = torch.optim.Adam(self.weights.values(), lr=1.0, betas=tuple(self.training.adam_betas))
        self.models = settings.pairs[settings.pair]
        num_models, each = len(self.models), int(self.config.dedicated * self.config.num_latents)
        self.foreign_LM = torch.zeros(self.config.num_latents, num_models, dtype=torch.bool)
        for owner in range(num_models):
            self.foreign_LM[owner * each : (owner + 1) * each] = torch.arange(num_models) != owner
        self.silent_L = torch.zeros(self.config.num_latents, dtype=torch.int64)
        self.threshold, self.steps_done = None, 0

    def step(self, raw_BMD):
        x_BMD = self.scaled(raw_BMD)
        dead_L = self.silent_L >= self.config.dead_after_tokens
        error_BMD, error_recons_BMD, score_BL, selected_BL = self.forward(x_BMD, dead_L)
        losses = self.losses(error_BMD, error_recons_BMD)
        self.adam.zero_grad()
        losses["train/loss"].backward()
        for name in ("W_enc", "W_dec"):
            self.weights[name].grad.view(*self.foreign_LM.shape, -1)[self.foreign_LM] = 0.0
        gradients = {name: weight.grad.clone() for name, weight in self.weights.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.training.max_grad_norm)
        self.adam.param_groups[0]["lr"] = rate = self.rate()
        self.adam.step()
        self.count(score_BL, selected_BL)
        numbers = {name: loss.item() for name, loss in losses.items()}
        numbers |= {"train/grad_norm": norm.item(), "train/lr": rate, "train/dead": int(dead_L.sum())}
        numbers |= {"train/l0": int(selected_BL.sum()) / len(x_BMD)} | self.variance_explained(x_BMD, error_BMD)
        numbers |= {} if self.threshold is None else {"train/threshold": self.threshold}
        selected = frozenset(map(tuple, selected_BL.nonzero().tolist()))
        return Outcome(numbers, selected, gradients, self.silent_L.tolist())

    def scaled(self, raw_BMD):
        return (raw_BMD.double() - self.mean_MD) * self.scale_M[:, None]

    def encode(self, x_BMD):
        """(pre, pre * s), the latter without graph."""
        pre_BL = torch.relu(x_BMD.flatten(1) @ self.weights["W_enc"].T + self.weights["b_enc"])
        scale_L = self.weights["W_dec"].detach().view(*self.foreign_LM.shape, -1).norm(dim=2).sum(1)
        return pre_BL, pre_BL.detach() * scale_L

    def forward(self, x_BMD, dead_L):
        pre_BL, score_BL = self.encode(x_BMD)
        W_dec, b_dec = self.weights["W_dec"], self.weights["b_dec"]
        selected_BL = largest(score_BL.view(1, -1), self.config.k * len(x_BMD)).view_as(score_BL)
        recons_BW = (pre_BL * selected_BL) @ W_dec + b_dec
        error_recons_BMD = None
        if self.config.auxk_alpha > 0 and dead_L.any():
            num_chosen = min(x_BMD.shape[2] // 2, int(dead_L.sum()))
            chosen_BZ = largest(score_BL[:, dead_L], num_chosen)
            error_recons_BMD = ((pre_BL[:, dead_L] * chosen_BZ) @ W_dec[dead_L]).view_as(x_BMD)
        return x_BMD - recons_BW.view_as(x_BMD), error_recons_BMD, score_BL, selected_BL

    def losses(self, error_BMD, error_recons_BMD):
        reconstruction, zero = error_BMD.norm(dim=2).mean(), error_BMD.new_zeros(())
        auxk, delta = zero, zero
        if error_recons_BMD is not None:
            fixed_BMD = error_BMD.detach()
            auxk = (fixed_BMD - error_recons_BMD).square().sum() / (fixed_BMD - fixed_BMD.mean(0)).square().sum()
        if self.config.delta_weight > 0:
            delta = sum((error_BMD[:, m] - error_BMD[:, 0]).norm(dim=1).mean() for m in range(1, error_BMD.shape[1]))
        total = reconstruction + self.config.auxk_alpha * auxk + self.config.delta_weight * delta
        return dict(zip(LOSSES, (total, reconstruction, auxk, delta), strict=True))

    def rate(self):
        """Linear warm-up, and a linear fall to zero over the last share of the run."""
        training, step = self.training, self.steps_done
        fall = training.decay_fraction * training.num_steps
        factor = min(1.0, (step + 1) / training.warmup_steps)
        return training.lr * factor * (min(1.0, (training.num_steps - step) / fall) if fall else 1.0)

    def count(self, score_BL, selected_BL):
        self.silent_L += len(score_BL)
        self.silent_L[selected_BL.any(0)] = 0
        if self.steps_done >= self.config.threshold_start_step:
            smallest, decay = score_BL[selected_BL].min().item(), self.config.threshold_decay
            before = smallest if self.threshold is None else self.threshold
            self.threshold = decay * before + (1 - decay) * smallest
        self.steps_done += 1

    def variance_explained(self, x_BMD, error_BMD):
        share_M = error_BMD.detach().square().sum((0, 2)) / (x_BMD - x_BMD.mean(0)).square().sum((0, 2))
        names = [f"train/variance_explained/{model}" for model in self.models]
        return dict(zip(names, (1 - share_M).tolist(), strict=True))


LOSSES = ("train/loss", "train/reconstruction", "train/auxk", "train/delta")


def largest(score_RN, num_chosen):
    """Mask of the `num_chosen` largest scores of each row that are positive; of equal ones the first."""
    index_RK = score_RN.sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]
    return torch.zeros_like(score_RN, dtype=torch.bool).scatter_(1, index_RK, True) & (score_RN > 0)
