"""What a judge is asked about a description, and what it may answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.annotate.annotations import Annotation
from analysis.examples.database import Example
from analysis.llm.config import LlmConfig
from analysis.llm.documents import fenced, marked, marks_for
from analysis.llm.prompting import object_schema, system_prompt
from analysis.llm.questions import Question
from analysis.scoring.trials import DETECTION, FUZZING, Trial

PROMPTS = {DETECTION: "detect", FUZZING: "fuzz"}
# What is said of each document: that the latent is active in it, or that the marks are right.
FIELDS = {"detect": "active", "fuzz": "right"}


def question_of(
    subject: str, kind: str, description: Annotation, trials: Sequence[Trial], context: int, judge: str, llm: LlmConfig
) -> Question:
    """Description and documents, fenced in. In detection nothing is marked; in fuzzing the trials' tokens are."""
    examples = [trial.example for trial in trials]
    marks = marks_for(examples)
    if kind == DETECTION:
        examples = [unmarked(example) for example in examples]
    texts = [marked(example, context, marks) for example in examples]
    parts = {"Label": description.label, "Pattern": description.pattern, "Description": description.description}
    said = "\n".join(f"{name}: {part}" for name, part in parts.items() if part)
    asked, prompt = "active" if kind == DETECTION else "rightly marked", PROMPTS[kind]
    verdict = object_schema({"document": {"type": "integer"}, FIELDS[prompt]: {"type": "boolean"}})
    return Question(
        kind=prompt,
        subject=subject,
        repeat=0,
        model=judge,
        system=system_prompt(prompt, {} if kind == DETECTION else {"open": marks[0], "close": marks[1]}),
        prompt=f"The description:\n{fenced([said])}\n\nThe documents:\n{fenced(texts)}\n\n"
        f"Which of the {len(texts)} documents are {asked}? Answer with the JSON object.",
        schema=object_schema({"verdicts": {"type": "array", "items": verdict}}),
        max_tokens=llm.max_tokens,
        effort=llm.effort,
    )


def unmarked(example: Example) -> Example:
    """The same place of the document with nothing to mark."""
    return replace(example, activations={example.peak: 0.0})


def verdicts_of(value: Mapping[str, Any], kind: str) -> list[bool]:
    """The answers to a question of that kind in the order of the documents."""
    said = FIELDS[PROMPTS[kind]]
    return [entry[said] for entry in sorted(value["verdicts"], key=lambda entry: entry["document"])]


def check_numbers(value: Mapping[str, Any], num_documents: int) -> str | None:
    """What is wrong with an answer that does not judge every document exactly once."""
    numbers = sorted(entry["document"] for entry in value["verdicts"])
    if numbers != list(range(1, num_documents + 1)):
        return f"the verdicts are on the documents {numbers}, not on 1 to {num_documents} once each"
    return None


def partners(annotations: Sequence[Annotation], group_of: Mapping[int, int], seed: int) -> dict[int, Annotation]:
    """For every latent the description of another one of the same owner: what the control judges by.

    Each takes that of the next latent in an order at random, skipping near-duplicates (latents of one group) and equal
    descriptions, which would be right for it too; none where all others are such. The order is one of hashes: a latent
    more or less changes the questions of its neighbours alone, and answers to the others are there already.
    """
    found = {}
    for owner in dict.fromkeys(annotation.owner for annotation in annotations):
        members = [annotation for annotation in annotations if annotation.owner == owner]
        turned = sorted(members, key=lambda member: hashlib.sha256(f"{seed} {member.latent}".encode()).digest())
        for place, mine in enumerate(turned):
            others = turned[place + 1 :] + turned[:place]
            fit = (other for other in others if _differs(mine, other, group_of))
            if (other := next(fit, None)) is not None:
                found[mine.latent] = other
    return found


def _differs(mine: Annotation, other: Annotation, group_of: Mapping[int, int]) -> bool:
    same_group = group_of.get(mine.latent, mine.latent) == group_of.get(other.latent, other.latent)
    return not same_group and (mine.label, mine.description) != (other.label, other.description)
