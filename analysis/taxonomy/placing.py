"""Descriptions into categories by language models: one of the taxonomy, or `other`, with a reason."""

from __future__ import annotations

import math
from typing import Any

from analysis.annotate.annotations import DESCRIBED, Annotation
from analysis.config import AnalysisSettings
from analysis.llm.asking import ask
from analysis.llm.config import LlmConfig
from analysis.llm.documents import fenced
from analysis.llm.ledger import Ledger, ledger_path
from analysis.llm.prompting import object_schema, system_prompt
from analysis.llm.questions import Answer, Question
from analysis.taxonomy.categories import OTHER, PLACED, Category, Placed, not_described


def place_by_llm(
    settings: AnalysisSettings, pair: str, annotations: list[Annotation], categories: list[Category]
) -> list[Placed]:
    """The category of every vote, by the model that described it (of an offline description, by the first model)."""
    llm = settings.analysis.llm
    questions = questions_on(pair, annotations, categories, llm)
    with Ledger(ledger_path(settings.outputs)) as ledger:
        answers = dict(zip(questions, ask(list(questions.values()), validate, llm, ledger), strict=True))
    groups = {category.name: category.group for category in categories} | {OTHER: OTHER}
    return [
        _placed(annotation, answers[annotation.latent, annotation.vote], groups)
        if annotation.outcome == DESCRIBED
        else not_described(annotation)
        for annotation in annotations
    ]


def questions_on(
    pair: str, annotations: list[Annotation], categories: list[Category], llm: LlmConfig
) -> dict[tuple[int, int], Question]:
    """The questions by latent and vote, on what is described."""
    system, schema = instructions(categories), schema_of(categories)
    return {
        (annotation.latent, annotation.vote): question_of(pair, annotation, system, schema, llm)
        for annotation in annotations
        if annotation.outcome == DESCRIBED
    }


def instructions(categories: list[Category]) -> str:
    """The system prompt: what is asked, and the taxonomy. It is the prefix that all questions share."""
    groups: dict[str, list[Category]] = {}
    for category in categories:
        groups.setdefault(category.group, []).append(category)
    return system_prompt("categorise", {"groups": list(groups.items()), "other": OTHER})


def schema_of(categories: list[Category]) -> dict[str, Any]:
    """An answer names a category of the taxonomy or `other`, and nothing else."""
    names = [category.name for category in categories]
    return object_schema({"category": {"type": "string", "enum": [*names, OTHER]}, "reason": {"type": "string"}})


def question_of(pair: str, annotation: Annotation, system: str, schema: dict[str, Any], llm: LlmConfig) -> Question:
    """What is asked about one description."""
    parts = {"Label": annotation.label, "Pattern": annotation.pattern, "Description": annotation.description}
    text = "\n".join(f"{name}: {part}" for name, part in parts.items() if part)
    return Question(
        kind="categorise",
        subject=f"{pair}/{annotation.latent}",
        repeat=annotation.repeat,
        model=annotation.annotator if annotation.request else llm.model,
        system=system,
        prompt=f"{fenced([text])}\n\nWhich category? Answer with the JSON object.",
        schema=schema,
        max_tokens=llm.max_tokens,
        effort=llm.effort,
    )


def validate(question: Question, value: dict[str, Any]) -> str | None:
    """The schema says it all but that a reason is given."""
    return None if value["reason"].strip() else "the reason is empty"


def _placed(annotation: Annotation, answer: Answer, groups: dict[str, str]) -> Placed:
    by = answer.model if annotation.request else f"{annotation.annotator}, category by {answer.model}"
    category = answer.value["category"] if answer.value else ""
    return Placed(
        annotation.latent,
        annotation.owner,
        category,
        groups.get(category, ""),
        math.nan,
        by,
        annotation.vote,
        PLACED if answer.value else answer.outcome,
        annotation.repeat,
        answer.value["reason"].strip() if answer.value else answer.reason,
    )
