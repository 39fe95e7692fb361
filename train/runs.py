"""Which pair a run trains, what the run is called, and which settings decide its result."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from extract.errors import BadInput
from train.config import TrainSettings

MAX_NAME = 160
# Settings of these sections that change how a run proceeds but not what it computes, to rounding.
WITHOUT_EFFECT = {
    "training.device",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.num_micro_steps",
    "training.log_every",
    "training.validate_every",
    "training.recovered_tokens",
    "data.max_validation_tokens",
    "data.memory_gb",
    "data.num_threads",
    "data.staging",
}
ONLINE_ONLY = {"data.calibration_tokens"}
SECTIONS = ("hookpoint", "seed", "kept", "crosscoder", "training", "data")


def selected_pair(settings: TrainSettings) -> str:
    """The pair that this run compares; BadInput with the choices when the study has several and none is selected."""
    if settings.pair is not None:
        return settings.pair
    if len(settings.pairs) == 1:
        return next(iter(settings.pairs))
    choices = (
        ", ".join(f"experiment={settings.study}/{pair}" for pair in settings.pairs)
        or "none: the study defines no pairs"
    )
    raise BadInput(
        f"A crosscoder compares one pair, and study {settings.study} has {len(settings.pairs)}. Choose: {choices}."
    )


def hookpoint_of(settings: TrainSettings) -> str:
    """Where a run's activations are taken: "block10", or one for each model where they differ, "block10,block20"."""
    hookpoints = [settings.place(member).hookpoint for member in settings.pairs[selected_pair(settings)]]
    return ",".join(hookpoints if len(set(hookpoints)) > 1 else hookpoints[:1])


def result_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide what training computes, as {dotted name: value}, sorted by name."""
    values = dataclasses.asdict(settings)
    return deciding({name: leaf for section in SECTIONS for name, leaf in leaves(section, values[section])})


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Of settings by their dotted names those that decide what training computes, sorted by name."""
    without_effect = WITHOUT_EFFECT if settings.get("data.mode") == "online" else WITHOUT_EFFECT | ONLINE_ONLY
    return {name: settings[name] for name in sorted(settings.keys() - without_effect)}


def run_name(settings: TrainSettings, experiment: TrainSettings) -> str:
    """`<pair>[,key=value...]`: the result settings that differ from those of `experiment` alone, sorted by name.

    Models and text are not part of it: they are the identity of the study, which has an outputs folder of its own. A
    setting is named without its section (`k` is crosscoder.k) unless two sections have one of that name. A name of more
    than MAX_NAME characters is cut and ends in a hash of the whole: file systems take 255 bytes.
    """
    before, now = result_settings(experiment), result_settings(settings)
    shared = Counter(_leaf(name) for name in now)
    changed = {
        name if shared[_leaf(name)] > 1 else _leaf(name): now[name] for name in now if now[name] != before.get(name)
    }
    name = ",".join([selected_pair(settings), *(f"{key}={_text(changed[key])}" for key in sorted(changed))])
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 13]},{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def run_folder(settings: TrainSettings, experiment: TrainSettings) -> Path:
    """Where the run writes: `<outputs>/runs/<run name>`."""
    return Path(settings.outputs) / "runs" / run_name(settings, experiment)


def _leaf(name: str) -> str:
    """ "crosscoder.k" -> "k"."""
    return name.rpartition(".")[2]


def leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """What a section of settings holds, by dotted names that begin with its own."""
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in leaves(f"{name}.{key}", child)]
    return [(name, value)]


def _text(value: Any) -> str:
    """A value as it is written on a command line, without blanks and slashes: it becomes part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return text.replace(" ", "").replace("/", "_").replace("None", "null")
