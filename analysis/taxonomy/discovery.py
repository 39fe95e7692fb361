"""A taxonomy from the descriptions of a study, instead of a given one.

The descriptions of all models are pooled, put into an order that says nothing about the models, and cut into blocks. A
language model proposes categories for each block, then merges the proposals, several lists at a time, until one
taxonomy is left. Descriptions of one model alone would make categories that only this model can fill: they are refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from analysis.annotate.annotations import ANNOTATIONS, DESCRIBED, Annotation, read_annotations
from analysis.config import AnalysisSettings
from analysis.llm.asking import ask
from analysis.llm.config import LlmConfig
from analysis.llm.documents import fenced
from analysis.llm.ledger import Ledger, ledger_path
from analysis.llm.prompting import object_schema, system_prompt
from analysis.llm.questions import Question, Validate
from analysis.taxonomy.step import RESERVED, load_taxonomy
from extract.errors import BadInput
from extract.publish import publish

FILE = "taxonomy.yaml"
# Descriptions that a question proposes categories for, and lists that one merges.
BLOCK, LISTS = 150, 8
MOST_CLASSES = 8
# An answer names dozens of categories.
MAX_TOKENS, TIMEOUT_S = 16_000, 900.0

TEXT = {"type": "string"}
CATEGORY_LIST = {"type": "array", "items": object_schema({"name": TEXT, "description": TEXT})}
PROPOSAL = object_schema({"categories": CATEGORY_LIST})
MERGED = object_schema(
    {"classes": {"type": "array", "items": object_schema({"name": TEXT, "categories": CATEGORY_LIST})}}
)

# Name and description.
Entry = tuple[str, str]


def discover(settings: AnalysisSettings, folders: list[Path]) -> Path:
    """The taxonomy of a study's analysis `folders`, one of each pair; what was discovered before stays as it is."""
    path = Path(settings.outputs) / "analysis" / FILE
    texts = pool(settings, folders)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    if path.exists():
        load_taxonomy(path)
        changed = "" if digest in path.read_text(encoding="utf-8") else " The descriptions have changed since."
        print(f"{path} was discovered before and stays.{changed} To discover anew, move it away.")
        return path
    config = settings.analysis
    with Ledger(ledger_path(settings.outputs)) as ledger:
        taxonomy = _distil(texts, config.taxonomy.most_categories, config.llm, ledger)
    head = f"# Discovered by {config.llm.model} from {len(texts)} descriptions of all models ({digest}).\n"
    text = yaml.safe_dump(taxonomy, sort_keys=False, allow_unicode=True, width=120)
    publish(path, (head + text).encode())
    load_taxonomy(path)
    return path


def pool(settings: AnalysisSettings, folders: list[Path]) -> list[str]:
    """The descriptions of all models, each once, ordered by their hashes; BadInput for those of one side."""
    missing = [folder.name for folder in folders if not (folder / ANNOTATIONS).exists()]
    if missing:
        raise BadInput(
            f"{missing[0]} is not annotated, and a taxonomy is discovered from the descriptions of all pairs of a "
            "study. Run `python -m analysis` for it first."
        )
    records = [record for folder in folders for record in read_annotations(folder) if record.outcome == DESCRIBED]
    owners = sorted({record.owner for record in records})
    if not owners:
        raise BadInput("No latent is described, and a taxonomy is discovered from descriptions. See annotations.jsonl.")
    if len(owners) < 2:
        raise BadInput(
            f"The descriptions are those of {owners[0]} alone: categories made from one side "
            "would favour it in every comparison. Use the built-in taxonomy (analysis.taxonomy.path=null), or compare "
            "models that both have latents of their own."
        )
    annotators = sorted({record.annotator for record in records})
    if len(annotators) > 1:
        raise BadInput(
            f"The pairs are described by different annotators ({', '.join(annotators)}): what these differ in would "
            "look like a difference between models. Run `python -m analysis` for all pairs with the same one."
        )
    texts = {_text(record) for record in records}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def _text(record: Annotation) -> str:
    return " ".join(f"{record.label}: {record.description}".split())


def _distil(texts: list[str], most: int, llm: LlmConfig, ledger: Ledger) -> dict[str, dict[str, str]]:
    """{class: {category: description}} by proposing for blocks of texts and merging what was proposed."""
    system = system_prompt("propose", {"most": most})
    blocks = [fenced(block) for block in _cut(texts, BLOCK)]
    found = _ask("propose", system, blocks, PROPOSAL, partial(_check_proposal, most), llm, ledger)
    lists = [_entries(value["categories"]) for value in found]
    system = system_prompt("merge", {"most": most, "most_classes": MOST_CLASSES})
    level = 0
    while True:
        level += 1
        prompts = [fenced([_lines(entries) for entries in group]) for group in _cut(lists, LISTS)]
        merged = _ask(f"merge {level}", system, prompts, MERGED, partial(_check_classes, most), llm, ledger)
        if len(merged) == 1:
            return {part["name"].strip(): dict(_entries(part["categories"])) for part in merged[0]["classes"]}
        lists = [[entry for part in value["classes"] for entry in _entries(part["categories"])] for value in merged]


def _cut(parts: list, size: int) -> list[list]:
    return [parts[start : start + size] for start in range(0, len(parts), size)]


def _entries(categories: list[dict[str, str]]) -> list[Entry]:
    return [(entry["name"].strip(), entry["description"].strip()) for entry in categories]


def _lines(entries: list[Entry]) -> str:
    return "\n".join(f"{name}: {description}" for name, description in entries)


def _ask(
    subject: str,
    system: str,
    prompts: list[str],
    schema: dict[str, Any],
    validate: Validate,
    llm: LlmConfig,
    ledger: Ledger,
) -> list[dict[str, Any]]:
    """The answers to all prompts; BadInput if one has none, since a part of the descriptions would be left out."""
    patient = replace(llm, timeout_s=max(llm.timeout_s, TIMEOUT_S), max_tokens=max(llm.max_tokens, MAX_TOKENS))
    questions = [
        Question(
            "discover", f"{subject}/{number}", 0, llm.model, system, prompt, schema, patient.max_tokens, llm.effort
        )
        for number, prompt in enumerate(prompts)
    ]
    values = []
    for question, answer in zip(questions, ask(questions, validate, patient, ledger), strict=True):
        if answer.value is None:
            raise BadInput(
                f"No taxonomy was discovered: {llm.model} did not answer {question.subject} ({answer.outcome}: "
                f"{answer.reason}). Raise analysis.llm.max_attempts_per_answer or choose another analysis.llm.model; "
                "what was answered is kept."
            )
        values.append(answer.value)
    return values


def _check_proposal(most: int, question: Question, value: dict[str, Any]) -> str | None:
    return _wrong(value["categories"], most)


def _check_classes(most: int, question: Question, value: dict[str, Any]) -> str | None:
    """What `load_taxonomy` would refuse, and more classes than were asked for."""
    names = [part["name"].strip() for part in value["classes"]]
    if not 1 <= len(names) <= MOST_CLASSES or len(set(names)) < len(names) or not all(names):
        return f"there must be 1 to {MOST_CLASSES} classes with different names"
    if not all(part["categories"] for part in value["classes"]):
        return "a class has no categories"
    return _wrong([entry for part in value["classes"] for entry in part["categories"]], most)


def _wrong(categories: list[dict[str, str]], most: int) -> str | None:
    entries = _entries(categories)
    names = [name.casefold() for name, _ in entries]
    if not 1 <= len(names) <= most:
        return f"there are {len(names)} categories, not 1 to {most}"
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        return f"the category {repeated!r} occurs twice"
    if not all(name and description for name, description in entries):
        return "a category has no name or no description"
    return "a category has a reserved name" if set(names) & set(RESERVED) else None
