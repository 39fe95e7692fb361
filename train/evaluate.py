"""python -m train.evaluate experiment=STUDY/PAIR [steps=all|last|published] [key=value ...]: measure a run's states.

A job of its own beside or after training: variance explained, L0, and loss recovered (`train.recovered`), which needs
the language models, of the run's checkpoints and of its published crosscoder. Writes `<run>/evaluation.jsonl`, one
line, a JSON object, for each state:

    step                  steps done
    of                    what was read: a checkpoint's name, or crosscoder
    measured_with         hash of what decides the values: settings, data, language models
    validation_tokens     held-out tokens of what training measures too: val/variance_explained/<member>, val/l0, ...
    replaced_tokens       held-out tokens whose activations are replaced for val/cross_entropy/<member>/{clean,
                          reconstructed,zero}, nats a token, and val/loss_recovered/<member>
    predicted_tokens      tokens that those cross-entropies are means over
    val/...               the measures; null where one is not finite

Without a threshold (before crosscoder.threshold_start_step) and with recovered_tokens=0 a line lacks what concerns loss
recovered.

The measures are also on W&B, in a run of their own.

A state that was measured with the same is not measured again. Checkpoints that training writes meanwhile are taken as
well, and those that it removes are left out: `training.keep_every` has it keep some.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    import torch

    from extract.command import experiment_of, run
    from extract.devices import choose_device
    from extract.errors import BadInput
    from extract.metrics_file import Metrics, plain
    from extract.mirror import FAILED, Mirror
    from extract.publish import publish
    from train.checkpoint import Checkpoints
    from train.checks import choice
    from train.config import TrainSettings
    from train.crosscoder import Crosscoder
    from train.data import TrainingData, heldout_batches
    from train.encoder import Operands
    from train.engine import SCALING
    from train.metric_table import metric_of, units
    from train.metrics import reconstructions, validation_metrics
    from train.pieces import SavedState
    from train.recovered import LossRecovered
    from train.runs import hookpoint_of, run_folder
    from train.trainer import checkpoints_of, open_data
    from train.world import World

FILE = "evaluation.jsonl"
log = logging.getLogger("train.evaluate")  # it may run as __main__


@dataclass
class EvaluateSettings(TrainSettings):
    """The settings of training, which name a run, and what of it is measured on how much."""

    # What is measured: all (every checkpoint, also those to come, and the published crosscoder), last (the newest of
    # them), or published.
    steps: str = "all"
    # Held-out tokens, of data.max_validation_tokens, to measure loss recovered on; 0 = without language models.
    recovered_tokens: int = 100_000

    def check(self) -> None:
        super().check()
        choice("steps", self.steps, ("all", "last", "published"))
        if self.recovered_tokens < 0:
            raise BadInput(f"recovered_tokens={self.recovered_tokens} must not be negative.")
        if self.data.heldout_fraction == 0:
            raise BadInput("data.heldout_fraction=0 holds out no document to measure on. It must be that of the run.")


class Evaluations:
    """The lines of `path` that were measured with the same; others are left as they are. Those that are added are also
    on W&B, in a run that `tracked` opens. A context manager.
    """

    def __init__(self, path: Path, measured_with: str, tracked: Callable[[], Mirror]):
        self.path, self._measured_with, self._tracked = path, measured_with, tracked
        self._mirror: Mirror | None = None
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # cut short by a crash
            publish(path, "".join(lines := lines[:-1]).encode())
        found = [json.loads(line) for line in lines]
        self.steps = {line["step"] for line in found if line["measured_with"] == measured_with}

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._mirror is not None:
            self._mirror.end(0 if kind is None else FAILED)

    def add(self, step: int, of: str, values: Metrics) -> None:
        """Append a line, durably."""
        line = {"step": step, "of": of, "measured_with": self._measured_with}
        line |= {name: plain(value) for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.steps.add(step)
        self._mirror = self._mirror or self._tracked()
        self._mirror.show({"step": step, **{name: value for name, value in values.items() if metric_of(name)}})


def evaluate(settings: EvaluateSettings, folder: Path) -> Path:
    """Measure the states of the run in `folder` that `settings.steps` names; returns where the lines are.

    Raises BadInput for data or models that cannot be used, a run without such states, and states of other settings.
    """
    world = World.alone(choose_device(settings.training.device, "training.device"))
    with ExitStack() as opened:
        data = opened.enter_context(closing(open_data(settings, world)))
        checkpoints = checkpoints_of(settings, folder, data, world)
        states, tried = states_of(settings, folder, checkpoints), set[int]()
        recovered = LossRecovered(settings, data, settings.recovered_tokens) if settings.recovered_tokens else None
        measured_with = _measured_with(settings, checkpoints)
        lines = opened.enter_context(Evaluations(folder / FILE, measured_with, lambda: tracked(settings, folder)))
        while (step := next((step for step in states if step not in lines.steps | tried), None)) is not None:
            tried.add(step)
            crosscoder = _load(states[step], settings, data, checkpoints)
            if crosscoder is not None:
                values = measure(crosscoder.to(world.device), settings, data, recovered)
                lines.add(step, states[step].name, values)
                log.info("step %d: %s", step, _described(values))
            if settings.steps == "all":
                states = _found(settings, folder, checkpoints)
    return lines.path


def tracked(settings: EvaluateSettings, folder: Path) -> Mirror:
    """The W&B run of all evaluations of the run in `folder`."""
    facts = asdict(settings) | {"units": units("val")}
    name = f"{folder.name} evaluation"
    return Mirror(settings.tracking, folder / "evaluation", name, "evaluate", settings.study, facts)


def states_of(settings: EvaluateSettings, folder: Path, checkpoints: Checkpoints) -> dict[int, Path]:
    """Folders of the states to measure, by the steps done, ascending. BadInput where there is none."""
    found, training = _found(settings, folder, checkpoints), settings.training
    if not found and settings.steps == "published":
        raise BadInput(
            f"{folder} holds no published crosscoder: the run has not ended. Choose steps=all to measure checkpoints."
        )
    if not found:
        raise BadInput(
            f"{folder} holds neither a complete checkpoint nor a published crosscoder. Train first, with the same "
            f"settings. Training saves every training.checkpoint_every={training.checkpoint_every} steps and keeps the "
            f"newest training.keep_checkpoints={training.keep_checkpoints}; those of every training.keep_every="
            f"{training.keep_every} steps stay (0 = none)."
        )
    if settings.steps == "all" and not training.keep_every:
        log.info("training.keep_every=0: of earlier checkpoints only the newest %d are kept", training.keep_checkpoints)
    return found


def measure(
    crosscoder: Crosscoder, settings: EvaluateSettings, data: TrainingData, recovered: LossRecovered | None
) -> Metrics:
    """The measures of a line, and the numbers of tokens that they are of."""
    operands, most = Operands.of(crosscoder), settings.data.max_validation_tokens
    batches = heldout_batches(data, settings.training.num_tokens_per_step, most)
    values: Metrics = {"validation_tokens": len(data.heldout_rows(most))}
    values |= validation_metrics(crosscoder, batches, operands)
    if recovered is None:
        return values
    if crosscoder.threshold is None:
        log.info("Without a threshold, which comes later in training, there is no reconstruction by inference")
        return values
    found = recovered.measure(lambda x_TMD: reconstructions(crosscoder, x_TMD, operands))
    documents = recovered.documents
    tokens = {"replaced_tokens": documents.num_replaced, "predicted_tokens": documents.num_predicted}
    return {**values, **tokens, **found}


def _found(settings: EvaluateSettings, folder: Path, checkpoints: Checkpoints) -> dict[int, Path]:
    published = folder / "crosscoder"
    last = {settings.training.num_steps: published} if published.exists() else {}
    if settings.steps == "published":
        return last
    found = checkpoints.complete() | last
    return found if settings.steps == "all" else {step: found[step] for step in list(found)[-1:]}


def _load(path: Path, settings: EvaluateSettings, data: TrainingData, checkpoints: Checkpoints) -> Crosscoder | None:
    """The crosscoder of a state; None where a checkpoint is damaged, or was removed since it was found."""
    if path.name == "crosscoder":
        crosscoder = Crosscoder.load(path)
        if crosscoder.trained_with:
            checkpoints.check(path, crosscoder.trained_with)
        return crosscoder
    try:
        saved = checkpoints.read(path)
    except FileNotFoundError:
        log.info("%s was removed meanwhile, by the training that it is of", path)
        return None
    return None if saved is None else _from_state(saved, settings, data)


@torch.no_grad()
def _from_state(saved: SavedState, settings: EvaluateSettings, data: TrainingData) -> Crosscoder:
    crosscoder = Crosscoder(settings.crosscoder, data.models, data.d_model, hookpoint_of(settings))
    for name in (*dict(crosscoder.named_parameters()), *SCALING):
        getattr(crosscoder, name).copy_(saved.rows(f"crosscoder.{name}"))
    crosscoder.threshold = saved.values["threshold"]
    return crosscoder


def _measured_with(settings: EvaluateSettings, checkpoints: Checkpoints) -> str:
    """The hashes of activations, part of the identity, are also of the models that they came from."""
    decisive: dict[str, Any] = {
        "run": checkpoints.identity,
        "validation_tokens": settings.data.max_validation_tokens,
        "recovered_tokens": settings.recovered_tokens,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _described(values: Metrics) -> str:
    chosen = ("val/variance_explained/", "val/loss_recovered/")
    named = {name.removeprefix("val/"): value for name, value in values.items() if name.startswith(chosen)}
    return ", ".join(f"{name} {value:.4f}" for name, value in named.items())


def main(settings: EvaluateSettings) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    print(f"evaluation: {evaluate(settings, run_folder(settings, experiment_of(settings)))}")


if __name__ == "__main__":
    run(EvaluateSettings, main)
