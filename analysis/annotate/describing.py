"""Descriptions of latents by language models, from documents with marked tokens."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from analysis.annotate.annotations import DESCRIBED, MAX_LABEL_WORDS, NO_DOCUMENTS, Annotation
from analysis.config import AnalysisSettings, AnnotateConfig
from analysis.examples.database import Example, read_examples
from analysis.llm.asking import ask
from analysis.llm.config import LlmConfig
from analysis.llm.documents import fenced, marked, marks_for
from analysis.llm.ledger import Ledger, ledger_path
from analysis.llm.prompting import object_schema, system_prompt
from analysis.llm.questions import Answer, Question

TEXT = {"type": "string"}
CONFIDENCES = ("low", "medium", "high")
SCHEMA = object_schema(
    {
        "pattern": TEXT,
        "label": TEXT,
        "description": TEXT,
        "confidence": {"type": "string", "enum": list(CONFIDENCES)},
        "reason": TEXT,
    }
)


@dataclass(frozen=True)
class Vote:
    """One reading of every latent by one annotator."""

    number: int
    annotator: str
    repeat: int


def votes_of(llm: LlmConfig) -> list[Vote]:
    """All votes: the first annotator's answer, its repeats, then those of the second annotator."""
    pairs = [(model, repeat) for model in llm.models for repeat in range(llm.repeats)]
    return [Vote(number, model, repeat) for number, (model, repeat) in enumerate(pairs)]


def describe_by_llm(
    settings: AnalysisSettings, pair: str, database: sqlite3.Connection, owned: list[tuple[int, str]]
) -> list[Annotation]:
    """The records of (latent, owner) pairs, one for each vote, in order of latent and vote."""
    questions, num_documents = questions_on(settings, pair, database, [latent for latent, _ in owned])
    with Ledger(ledger_path(settings.outputs)) as ledger:
        found = ask(list(questions.values()), validate, settings.analysis.llm, ledger)
    return records_of(owned, votes_of(settings.analysis.llm), num_documents, dict(zip(questions, found, strict=True)))


def questions_on(
    settings: AnalysisSettings, pair: str, database: sqlite3.Connection, latents: list[int]
) -> tuple[dict[tuple[int, int], Question], dict[int, int]]:
    """The questions by latent and vote, and how many documents of each latent there are to show: of none, no question
    is asked.
    """
    config, llm = settings.analysis.annotate, settings.analysis.llm
    questions, num_documents = {}, {}
    for latent in latents:
        # Documents of one latent at a time: those of thousands are gigabytes, and their questions are not.
        examples = read_examples(database, latent, config.num_documents)
        num_documents[latent] = len(examples)
        for vote in votes_of(llm) if examples else ():
            questions[latent, vote.number] = question_of(f"{pair}/{latent}", vote, examples, config, llm)
        del examples
    return questions, num_documents


def question_of(subject: str, vote: Vote, examples: list[Example], config: AnnotateConfig, llm: LlmConfig) -> Question:
    """What is asked about one latent in one vote."""
    marks = marks_for(examples)
    highest = max(example.activations[example.peak] for example in examples)
    strengths = [f"strength {10 * example.activations[example.peak] / highest:.0f}" for example in examples]
    texts = [marked(example, config.context_tokens, marks) for example in examples]
    return Question(
        kind="describe",
        subject=subject,
        repeat=vote.repeat,
        model=vote.annotator,
        system=system_prompt("describe", {"open": marks[0], "close": marks[1]}),
        prompt=f"{fenced(texts, strengths)}\n\nWhat is this latent active on? Answer with the JSON object.",
        schema=SCHEMA,
        max_tokens=llm.max_tokens,
        effort=llm.effort,
    )


def validate(question: Question, value: dict[str, Any]) -> str | None:
    """What the schema cannot say: a label of one to five words, and no text empty."""
    words = len(value["label"].split())
    if not 1 <= words <= MAX_LABEL_WORDS:
        return f"the label has {words} words, not 1 to {MAX_LABEL_WORDS}"
    empty = [name for name in ("pattern", "description", "reason") if not value[name].strip()]
    return f"the {empty[0]} is empty" if empty else None


def records_of(
    owned: list[tuple[int, str]],
    votes: list[Vote],
    num_documents: dict[int, int],
    answers: dict[tuple[int, int], Answer],
) -> list[Annotation]:
    """The lines of all votes on all latents, by the answers that there are."""
    return [
        record_of(latent, owner, vote, num_documents[latent], answers.get((latent, vote.number)))
        for latent, owner in owned
        for vote in votes
    ]


def record_of(latent: int, owner: str, vote: Vote, num_documents: int, answer: Answer | None) -> Annotation:
    """The line of one vote; what is not an answer leaves no label."""
    value = (answer.value if answer else None) or {}
    described = bool(value)
    return Annotation(
        latent=latent,
        owner=owner,
        label=" ".join(value.get("label", "").split()),
        description=value.get("description", "").strip(),
        confidence=value.get("confidence", ""),
        reason=value["reason"].strip() if described else answer.reason if answer else "no document is stored",
        annotator=vote.annotator,
        num_documents=num_documents,
        evidence=(),
        fragments=(),
        vote=vote.number,
        repeat=vote.repeat,
        outcome=DESCRIBED if described else answer.outcome if answer else NO_DOCUMENTS,
        pattern=value.get("pattern", "").strip(),
        usage=answer.usage if answer else {},
        request=answer.question if answer else "",
    )
