"""Which steps of the analysis are missing, and doing just those.

A step writes its outputs and then `<step>.json`: its settings, the sha256 of every file that it read, and the sizes of
those that it wrote. A step whose record says what a new one would say is skipped; any other is done again, and with it
what depends on its outputs, because their hashes change.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from analysis.annotate.step import annotate, has_failed
from analysis.compare.step import WRITTEN as COMPARED
from analysis.compare.step import compare, inputs_of_comparison, outputs_of
from analysis.config import AnalysisConfig, AnalysisSettings
from analysis.latents.step import EXAMPLES, FORMAT_VERSION, LATENTS, MAXIMA, OUTPUTS, write_latents
from analysis.llm.prompting import hash_of
from analysis.made_with import RECORDS
from analysis.report.step import NEEDED, REPORTED, optional_inputs, report
from analysis.report.step import WRITTEN as DRAWN
from analysis.scoring.agreeing import AGREEMENT, said_by_people, write_agreement
from analysis.scoring.judging import PROMPTS
from analysis.scoring.scores import SCORES, SUMMARY, VERDICTS
from analysis.scoring.step import has_failed_scores, judge_of, score
from analysis.tags import write_tags
from analysis.taxonomy.step import DEFAULT, categorise, has_failed_places, placer_of
from analysis.written_files import is_incomplete
from extract.command import OWNERS
from extract.errors import BadInput
from extract.publish import publish
from train.crosscoder import CONFIG_FILE, WEIGHTS_FILE
from train.runs import selected_pair

ANNOTATIONS, CATEGORIES, CLASSES, TAGS = "annotations.jsonl", "categories.csv", "classes.csv", "tags.csv"


@dataclass(frozen=True)
class Step:
    """What decides a step's outputs (`settings`, and `inputs` by their names in the record), and how it is done."""

    name: str
    settings: dict
    inputs: dict[str, Path]
    outputs: tuple[str, ...]
    work: Callable[[], object]
    # Whether the outputs hold failures of a kind that doing the step again may mend.
    is_lacking: Callable[[], bool] = lambda: False


def run_steps(steps: list[Step], folder: Path) -> bool:
    """Does the steps that are missing in `folder`, in their order, and says which it skips; whether any was missing."""
    any_missing = False
    for step in steps:
        record = record_of(step)
        path = folder / f"{step.name}.json"
        if is_done(step, record, path) and not step.is_lacking():
            print(f"{folder.name}: {step.name} is up to date")
            continue
        print(f"{folder.name}: {step.name}")
        with withdrawn(path, [folder / output for output in step.outputs]):
            step.work()
        publish(path, _text(record, step, folder))
        any_missing = True
    return any_missing


@contextmanager
def withdrawn(path: Path, outputs: list[Path]) -> Iterator[None]:
    """The record at `path` is gone while outputs are replaced; it comes back if what fails has touched none of them."""
    before, stamps = path.read_bytes() if path.exists() else None, _stamps(outputs)
    path.unlink(missing_ok=True)
    try:
        yield
    except BaseException:  # of a signal to stop, too
        if before is not None and _stamps(outputs) == stamps:
            publish(path, before)
        raise


def _stamps(outputs: list[Path]) -> list[tuple[Path, int, int, int]]:
    """What tells whether files, or those in folders, were replaced."""
    found = sorted({file for output in outputs for file in (output, *output.rglob("*"))})
    stats = [(file, file.stat()) for file in found if file.exists()]
    return [(file, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in stats]


def record_of(step: Step) -> dict:
    """What the record of a step says once it is done, but for its outputs. BadInput for an input that is missing."""
    hashes = {name: sha256_of(path) for name, path in step.inputs.items()}
    return {"step": step.name, "settings": step.settings, "inputs": hashes}


def is_done(step: Step, record: dict, path: Path) -> bool:
    """Whether the record at `path` is this one and no output was deleted or cut off since."""
    if not path.exists() or not all((path.parent / output).exists() for output in step.outputs):
        return False
    return path.read_bytes() == _text(record, step, path.parent)


def _text(record: dict, step: Step, folder: Path) -> bytes:
    """The record in a file, with the bytes of every output as it lies there; a folder has none of its own."""
    sizes = {name: (folder / name).stat().st_size for name in step.outputs if (folder / name).is_file()}
    return (json.dumps(record | {"outputs": sizes}, indent=1) + "\n").encode()


def is_current(step: Step, folder: Path) -> bool:
    """Whether there is nothing to do in a step now; what it reads may be missing, as where no step was done yet."""
    path = folder / f"{step.name}.json"
    if not path.exists() or not all(read.exists() for read in step.inputs.values()):
        return False
    return is_done(step, record_of(step), path) and not step.is_lacking()


def sha256_of(path: Path) -> str:
    """Hash of a file's content. Several steps read the same gigabytes: they are hashed once as long as they stay."""
    if not path.exists():
        raise BadInput(f"{path} is missing, and the analysis reads it. Run `python -m analysis` for this pair first.")
    stat = path.stat()
    return _sha256_at(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_at(path: Path, *stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps_of_pair(settings: AnalysisSettings, crosscoder_folder: Path, folder: Path) -> list[Step]:
    """latents (with examples and document maxima, in one reading of the store), tags, annotate, categorise, score."""
    config = settings.analysis
    tokens = settings.tokens_folder / "manifest.json"
    taxonomy = {"taxonomy": Path(config.taxonomy.path or DEFAULT)}
    return [
        Step(
            "latents",
            {name: asdict(getattr(config, name)) for name in ("owner", "examples", "intervals", "nulls")}
            | {"kept": asdict(settings.kept), "format_version": FORMAT_VERSION},
            inputs_of_latents(settings, crosscoder_folder),
            OUTPUTS,
            lambda: write_latents(settings, crosscoder_folder, folder),
        ),
        Step(
            "tags",
            asdict(config.tags) | {"intervals": "percentiles and further prompts"},
            {"tokens": tokens, **files(folder, LATENTS, MAXIMA)},
            (TAGS,),
            lambda: write_tags(settings, folder),
        ),
        Step(
            "annotate",
            asdict(config.annotate) | _asked(config, "describe", config.annotate.annotator == "llm"),
            files(folder, LATENTS, EXAMPLES),
            (ANNOTATIONS,),
            lambda: annotate(settings, folder),
            lambda: has_failed(folder),
        ),
        Step(
            "categorise",
            asdict(config.taxonomy) | _asked(config, "categorise", placer_of(config) == "llm"),
            taxonomy | files(folder, ANNOTATIONS),
            (CATEGORIES, CLASSES),
            lambda: categorise(settings, folder),
            lambda: has_failed_places(folder),
        ),
        _score(settings, folder),
    ]


def _score(settings: AnalysisSettings, folder: Path) -> Step:
    """Held-out tests of the descriptions, if there is a judge, and agreement between votes."""
    config, judge = settings.analysis, judge_of(settings.analysis)
    decides = asdict(config.scoring) | {"agreement": asdict(config.agreement), "judge": judge}
    if judge:
        prompts = {f"prompt_{name}": hash_of(name) for name in PROMPTS.values()}
        decides |= {"num_shown": config.annotate.num_documents, "llm": config.llm.decisive} | prompts
    taxonomy = {"taxonomy": Path(config.taxonomy.path or DEFAULT)}
    return Step(
        "score",
        decides,
        taxonomy | files(folder, LATENTS, EXAMPLES, ANNOTATIONS, CATEGORIES) | said_by_people(settings),
        (AGREEMENT, *((SCORES, SUMMARY, VERDICTS) if judge else ())),
        lambda: score(settings, folder),
        lambda: has_failed_scores(folder),
    )


def _asked(config: AnalysisConfig, prompt: str, is_asked: bool) -> dict:
    """What decides the answers of language models, for a step that asks them."""
    return {"llm": config.llm.decisive | {"prompt": hash_of(prompt)}} if is_asked else {}


def steps_of_study(settings: AnalysisSettings, folders: list[Path]) -> list[Step]:
    """compare, agreement and report over the analysis `folders` of all pairs; their records lie in `outputs/report`."""
    config, target = settings.analysis, Path(settings.outputs) / "report"
    pooled = Path(settings.outputs) / "analysis" / AGREEMENT
    inputs = {"taxonomy": Path(config.taxonomy.path or DEFAULT)}
    for folder in folders:
        run = Path(settings.outputs) / "runs" / folder.name
        made = [run / "metrics.jsonl", run / "config.yaml", *(folder / name for name in RECORDS)]
        found = files(folder, *NEEDED) | {path.name: path for path in made if path.exists()}
        inputs |= {f"{folder.name}/{name}": path for name, path in found.items()}
    inputs |= inputs_of_comparison(config.compare, folders)
    chosen = {name: asdict(getattr(config, name)) for name in ("taxonomy", "compare")}
    of_page = {name: asdict(getattr(config, name)) for name in ("tags", "annotate", "report")}
    shown = {"hookpoint": settings.hookpoint, **chosen, **of_page}
    return [
        Step(
            "compare",
            chosen,
            inputs,
            (*outputs_of(config.compare, folders), COMPARED),
            lambda: compare(settings, folders, target),
            lambda: is_incomplete(target / COMPARED),
        ),
        Step(
            "agreement",
            asdict(config.agreement),
            _inputs_of_agreement(settings, folders),
            (f"../{pooled.relative_to(settings.outputs)}",),
            lambda: write_agreement(settings, folders, pooled.parent),
        ),
        Step(
            "report",
            shown,
            inputs | optional_inputs(Path(settings.outputs), folders) | {AGREEMENT: pooled},
            REPORTED,
            lambda: report(settings, folders),
            lambda: is_incomplete(target / DRAWN),
        ),
    ]


def _inputs_of_agreement(settings: AnalysisSettings, folders: list[Path]) -> dict[str, Path]:
    found = {"taxonomy": Path(settings.analysis.taxonomy.path or DEFAULT), **said_by_people(settings)}
    for folder in folders:
        verdicts = [VERDICTS] if (folder / VERDICTS).exists() else []  # of the judge, where there is one
        names = [LATENTS, CATEGORIES, *verdicts]
        found |= {f"{folder.name}/{name}": folder / name for name in names}
    return found


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
