"""A step of one process up to its gradients, from a given crosscoder: the readable form and the fast one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from train.batch_topk import Selected
from train.encoder import Operands
from train.forms import ReadableForm, SparseForm, Task
from train.micro_batches import MicroBatches
from train.placement import Share
from train.step import Step, differentiate


class Found(NamedTuple):
    """What a step selected, its losses (total, reconstruction, auxk, delta), and the gradients of the four weights."""

    selected: Selected
    losses: list[float]
    gradients: list[torch.Tensor]


class Bare:
    """As much of a placement as `differentiate` asks for."""

    def backward(self, loss):
        loss.backward()


def task_of(crosscoder, x_BMD, num_selected, dead_L, number=1, operands=None, candidate_Z=None, fixed_size=False):
    """Scaled activations, in `number` micro-batches, are those of a crosscoder that does not scale."""
    if crosscoder.config.auxk_alpha == 0:
        candidate_Z = None
    elif candidate_Z is None and dead_L.any():
        candidate_Z = dead_L.nonzero().squeeze(1)
    share = Share(crosscoder.num_latents)
    batches = MicroBatches(crosscoder, share, x_BMD, None, number)
    operands = operands or Operands.of(crosscoder)
    return Task(crosscoder, operands, share, batches, num_selected, dead_L, dead_L.any(), candidate_Z, fixed_size)


def run(crosscoder, task, form):
    """Differentiate, and zero the foreign rows of gradients."""
    outcome = differentiate(Bare(), Step(task, form, measured=False), len(task.batches))
    gradients = [weight.grad for weight in crosscoder.parameters()]
    crosscoder.zero_foreign_rows(gradients[0], gradients[2])
    return Found(outcome.selected, outcome.losses_4.tolist(), [gradient.clone() for gradient in gradients])


def readable(crosscoder, x_BMD, num_selected, dead_L, precision=None, **task):
    crosscoder.zero_grad()
    task = task_of(crosscoder, x_BMD, num_selected, dead_L, **task)
    return run(crosscoder, task, ReadableForm(task, precision))


def sparse(crosscoder, x_BMD, num_selected, dead_L, gradients=None, **task):
    """With `gradients` these are the weights' .grad."""
    if gradients is None:
        crosscoder.zero_grad()
    task = task_of(crosscoder, x_BMD, num_selected, dead_L, **task)
    return run(crosscoder, task, SparseForm(task, gradients))
