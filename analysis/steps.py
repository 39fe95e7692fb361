"""Which steps of the analysis are missing, and doing just those.

A step writes its outputs and then `<step>.json`: its settings and the sha256 of every file that it read. A step whose
record says what a new one would say is skipped; any other is done again, and with it what depends on its outputs,
because their hashes change.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.annotate import annotate
from analysis.comparison import compare, outputs_of
from analysis.config import AnalysisSettings
from analysis.latents import EXAMPLES, LATENTS, MAXIMA, write_latents
from analysis.report import NEEDED, report
from analysis.tags import write_tags
from analysis.taxonomy import DEFAULT, categorise
from extract.command import OWNERS
from extract.errors import BadInput
from extract.publish import publish
from train.crosscoder import CONFIG_FILE, WEIGHTS_FILE
from train.runs import selected_pair

ANNOTATIONS, CATEGORIES, CLASSES, TAGS, INDEX = (
    "annotations.jsonl",
    "categories.csv",
    "classes.csv",
    "tags.csv",
    "index.html",
)


@dataclass(frozen=True)
class Step:
    """What decides a step's outputs (`settings`, and `inputs` by their names in the record), and how it is done."""

    name: str
    settings: dict
    inputs: dict[str, Path]
    outputs: tuple[str, ...]
    work: Callable[[], object]


def run_steps(steps: list[Step], folder: Path) -> bool:
    """Does the steps that are missing in `folder`, in their order, and says which it skips; whether any was missing."""
    any_missing = False
    for step in steps:
        record = record_of(step)
        path = folder / f"{step.name}.json"
        if is_done(step, record, path):
            print(f"{folder.name}: {step.name} is up to date")
            continue
        path.unlink(missing_ok=True)
        print(f"{folder.name}: {step.name}")
        step.work()
        publish(path, (json.dumps(record, indent=1) + "\n").encode())
        any_missing = True
    return any_missing


def record_of(step: Step) -> dict:
    """What the record of a step says once it is done. BadInput for an input that is missing."""
    hashes = {name: sha256_of(path) for name, path in step.inputs.items()}
    return {"step": step.name, "settings": step.settings, "inputs": hashes}


def is_done(step: Step, record: dict, path: Path) -> bool:
    """Whether the record at `path` is this one and no output was deleted since."""
    if not path.exists() or not all((path.parent / output).exists() for output in step.outputs):
        return False
    return path.read_bytes() == (json.dumps(record, indent=1) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    if not path.exists():
        raise BadInput(f"{path} is missing, and the analysis reads it. Run `python -m analysis` for this pair first.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps_of_pair(settings: AnalysisSettings, crosscoder_folder: Path, folder: Path) -> list[Step]:
    """latents (with examples and document maxima, in one reading of the store), tags, annotate, categorise."""
    config = settings.analysis
    tokens = settings.tokens_folder / "manifest.json"
    taxonomy = {"taxonomy": Path(config.taxonomy.path or DEFAULT)}
    return [
        Step(
            "latents",
            {"owner": asdict(config.owner), "examples": asdict(config.examples), "kept": asdict(settings.kept)},
            inputs_of_latents(settings, crosscoder_folder),
            (LATENTS, EXAMPLES, MAXIMA),
            lambda: write_latents(settings, crosscoder_folder, folder),
        ),
        Step(
            "tags",
            asdict(config.tags),
            {"tokens": tokens, **files(folder, LATENTS, MAXIMA)},
            (TAGS,),
            lambda: write_tags(settings, folder),
        ),
        Step(
            "annotate",
            asdict(config.annotate),
            files(folder, LATENTS, EXAMPLES),
            (ANNOTATIONS,),
            lambda: annotate(settings, folder),
        ),
        Step(
            "categorise",
            asdict(config.taxonomy),
            taxonomy | files(folder, ANNOTATIONS),
            (CATEGORIES, CLASSES),
            lambda: categorise(settings, folder),
        ),
    ]


def steps_of_study(settings: AnalysisSettings, folders: list[Path]) -> list[Step]:
    """compare and report over the analysis `folders` of all pairs; they write into `outputs/report`."""
    config = settings.analysis
    inputs = {"taxonomy": Path(config.taxonomy.path or DEFAULT)}
    for folder in folders:
        run = Path(settings.outputs) / "runs" / folder.name
        training = {path.name: path for path in (run / "metrics.jsonl", run / "config.yaml") if path.exists()}
        inputs |= {f"{folder.name}/{name}": path for name, path in (files(folder, *NEEDED) | training).items()}
    chosen = {"taxonomy": asdict(config.taxonomy), "compare": asdict(config.compare)}
    shown = chosen | {name: asdict(getattr(config, name)) for name in ("owner", "tags", "annotate", "report")}
    shown["kept"] = asdict(settings.kept) | {"hookpoint": settings.hookpoint}
    return [
        Step("compare", chosen, inputs, outputs_of(folders), lambda: compare(settings, folders)),
        Step("report", shown, inputs, (INDEX, "figures", "tables"), lambda: report(settings, folders)),
    ]


def inputs_of_latents(settings: AnalysisSettings, crosscoder_folder: Path) -> dict[str, Path]:
    """The crosscoder and the manifests, which hold hashes of all shards.

    Raises BadInput with the command that makes what is missing.
    """
    inputs = {
        **files(crosscoder_folder, WEIGHTS_FILE, CONFIG_FILE),
        **{
            f"activations of {member}": settings.activations_folder(place.model, place.hookpoint) / "manifest.json"
            for member in settings.pairs[selected_pair(settings)]
            for place in [settings.place(member)]
        },
        "tokens": settings.tokens_folder / "manifest.json",
    }
    makers = {"tokens": "extract.tokens", WEIGHTS_FILE: "train", CONFIG_FILE: "train"}
    for name in reversed(inputs):  # the earliest stage that is missing is the one to run
        if not inputs[name].exists():
            command = command_line(makers.get(name, "extract.activations"), settings.composed_from)
            raise BadInput(f"{inputs[name]} is missing. Run `{command}` first.{_beside(settings, name)}")
    return inputs


def _beside(settings: AnalysisSettings, missing: str) -> str:
    """What to say about activations to those who trained without storing any."""
    if settings.data.mode != "online" or not missing.startswith("activations"):
        return ""
    return (
        " Unlike training with data=online, the analysis reads stored activations: of all tokens, or of fewer in a "
        "store of their own (store=PATH, with its own corpus.num_tokens)."
    )


def command_line(module: str, overrides: list[str]) -> str:
    """The command that runs `module` with those of `overrides` that it knows."""
    command = f"python -m {module}"
    known = [override for override in overrides if OWNERS.get(re.split(r"[.=/]", override)[0], command) == command]
    return " ".join([command, *known])


def files(folder: Path, *names: str) -> dict[str, Path]:
    """Files of a folder by their names."""
    return {name: folder / name for name in names}
