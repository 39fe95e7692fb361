"""One training problem, run by any engine on any number of ranks, and what it leaves for a comparison."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from planted import settings_of

from train.config import CrosscoderConfig, TrainingConfig
from train.engine import Engine
from train.pieces import Piece, TrainingState

NUM_STEPS, NUM_TOKENS, D_MODEL = 30, 32, 6
MODELS = ("base", "tuned", "other")
# The batches of which rank 0 of 1, 2 and 4 holds nearly all winners.
SKEWED = range(3, NUM_STEPS, 9)


@dataclass(frozen=True)
class Case:
    """An engine on some ranks, and what its settings change in the problem."""

    engine: str
    num_ranks: int
    step: str = "sparse"
    options: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    crosscoder: dict = field(default_factory=dict)
    num_models: int = 2
    dtype: torch.dtype = torch.float32

    def __str__(self):
        changes = [f"{k}={v}" for part in (self.options, self.training, self.crosscoder) for k, v in part.items()]
        models = [] if self.num_models == 2 else [f"{self.num_models} models"]
        dtype = ["float64"] if self.dtype == torch.float64 else []
        return " ".join([self.engine, str(self.num_ranks), self.step, *changes, *models, *dtype])

    @property
    def num_latents(self):
        return settings(self).crosscoder.num_latents

    def reference(self):
        """The same problem as the readable step of one process solves it."""
        training = {name: value for name, value in self.training.items() if name != "num_micro_steps"}
        return replace(self, engine="single", num_ranks=1, step="readable", options={}, training=training)


class Trace(NamedTuple):
    """What a rank reports: metrics of each step, (token, latent) pairs that it kept, its pieces after each step."""

    metrics: list[dict[str, float]]
    selected: list[list[tuple[int, int]]]
    states: list[TrainingState]


def settings(case):
    made = settings_of(Path("unused"))
    models = MODELS[: case.num_models]
    made.pairs, made.models = {made.pair: list(models)}, dict.fromkeys(models, made.models["base"])
    crosscoder = CrosscoderConfig(
        num_latents=48, k=3, dead_after_tokens=96, threshold_start_step=5, threshold_decay=0.9, delta_weight=0.1
    )
    training = TrainingConfig(
        num_tokens=NUM_STEPS * NUM_TOKENS,
        num_tokens_per_step=NUM_TOKENS,
        lr=1e-2,
        warmup_steps=4,
        decay_fraction=0.25,
        max_grad_norm=1.5,
        step=case.step,
        device="cpu",
    )
    made.crosscoder, made.training = replace(crosscoder, **case.crosscoder), replace(training, **case.training)
    made.engine = replace(made.engine, name=case.engine, **case.options)
    return made


def scaling(case):
    """(activation_mean, activation_scale) of the problem."""
    if case.crosscoder.get("activation_scaling") == "none":
        return torch.zeros(case.num_models, D_MODEL), torch.ones(case.num_models)
    mean_MD = torch.randn(case.num_models, D_MODEL, generator=generator(1), dtype=torch.float32)
    return 0.1 * mean_MD, torch.tensor([0.5, 0.8, 0.7][: case.num_models], dtype=torch.float32)


def batches(case, count=NUM_STEPS):
    """Raw batches (B, M, D) as they are stored, in bf16, and (B,) the tokens in the order in which ranks share them."""
    random, made = generator(0), []
    for step in range(count):
        x_BMD = 2 * torch.randn(NUM_TOKENS, case.num_models, D_MODEL, generator=random, dtype=torch.float32)
        order_B = torch.randperm(NUM_TOKENS, generator=random)
        if step in SKEWED:
            x_BMD[order_B[: NUM_TOKENS // 4]] *= 30
        made.append((x_BMD.bfloat16(), order_B))
    return made


def generator(seed):
    return torch.Generator().manual_seed(seed)


def part(batch, group):
    """This rank's tokens of a batch in ascending order, and their numbers in it; None for one rank."""
    x_BMD, order_B = batch
    if group.size == 1:
        return x_BMD, None
    token_b = order_B.chunk(group.size)[group.rank].sort().values
    return x_BMD[token_b], token_b


def engine_of(world, case):
    return Engine(settings(case), list(MODELS[: case.num_models]), D_MODEL, *scaling(case), world)


def copied(state):
    """A state that the next step leaves alone."""
    pieces = {
        name: Piece(piece.rows.detach().clone(), piece.first, piece.num_rows) for name, piece in state.tensors.items()
    }
    return TrainingState(pieces, dict(state.values))


@contextmanager
def selections():
    """A list that collects the pairs which this process selects in each step, numbered as in the whole batch."""
    found, differentiate = [], Engine._differentiate

    def differentiate_and_note(engine, operands, batches, measured):
        outcome = differentiate(engine, operands, batches, measured)
        positive_S = outcome.selected.score_S > 0
        token_S, latent_S = (index_S[positive_S] for index_S in outcome.selected.selection)
        token_S = token_S if batches.token_B is None else batches.token_B[token_S]
        latent_S = latent_S + engine.share.first_latent
        found.append(list(zip(token_S.tolist(), latent_S.tolist(), strict=True)))
        return outcome

    with mock.patch.object(Engine, "_differentiate", differentiate_and_note):
        yield found


def initial_state(world, case):
    """This rank's pieces of the first weights."""
    torch.set_default_dtype(case.dtype)
    engine = engine_of(world, case)
    engine.initialise(*part(batches(case)[0], world.everyone))
    return copied(engine.state())


def run(world, case, data, states):
    """A step for each batch, from the state given for it, or, where that is None, from where the last one led."""
    torch.set_default_dtype(case.dtype)
    engine, metrics, after = engine_of(world, case), [], []
    with selections() as selected:
        for batch, state in zip(data, states, strict=True):
            if state is not None:
                engine.load_state(state)
            x_bMD, token_b = part(batch, world.everyone)
            metrics.append(engine.step(x_bMD, token_b=token_b))
            after.append(copied(engine.state()))
    return Trace(metrics, selected, after)


def positive(metrics):
    """Numbers that can be compared by their size: of explained variance what it leaves."""
    return {name: 1 - value if "variance_explained" in name else value for name, value in metrics.items()}
