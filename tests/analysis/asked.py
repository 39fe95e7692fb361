"""Questions for the stub of the Messages API, and settings that reach it."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.config import AnalysisSettings
from analysis.llm.client import connect
from analysis.llm.config import LlmConfig
from analysis.llm.estimating import Estimate, estimate
from analysis.llm.ledger import Ledger
from analysis.llm.prompting import object_schema
from analysis.llm.questions import Question
from tests.analysis.made_study import make_study
from tests.analysis.messages_rules import by_schema
from tests.analysis.messages_stub import MessagesStub, Plan

MODEL = "claude-sonnet-5-5"
SCHEMA = object_schema({"category": {"type": "string", "enum": ["fruit", "tool"]}, "reason": {"type": "string"}})
SYSTEM = "Say whether it is a fruit or a tool. " * 40


def question(number: int, **changes: Any) -> Question:
    """A question of its own for every number."""
    asked: dict[str, Any] = {
        "kind": "categorise",
        "subject": f"pair/{number}",
        "repeat": 0,
        "model": MODEL,
        "system": SYSTEM,
        "prompt": f"thing {number}",
        "schema": SCHEMA,
        "max_tokens": 300,
    }
    return Question(**(asked | changes))


def config(stub: MessagesStub, **changes: Any) -> LlmConfig:
    """Settings for short tests, with the prices of the API."""
    llm = LlmConfig(base_url=stub.url, timeout_s=1.0, max_retries=2, poll_s=0.05, prices={MODEL: [2.0, 10.0, 2.5, 0.1]})
    for name, value in changes.items():
        setattr(llm, name, value)
    return llm


def study(root: Path, stub: MessagesStub, **changes: Any) -> tuple[AnalysisSettings, Path]:
    """The first pair of a small study that a language model annotates."""
    settings, (folder, _) = make_study(root)
    settings.analysis.annotate.annotator = "llm"
    settings.analysis.llm = config(stub, **changes)
    return settings, folder


def estimated(questions: Sequence[Question], llm: LlmConfig, ledger: Ledger) -> Estimate:
    """What questions are expected to cost, before they are asked."""

    async def found() -> Estimate:
        async with connect(llm) as client:
            return await estimate(client, questions, llm, ledger)

    return asyncio.run(found())


def anything(question: Question, value: dict[str, Any]) -> str | None:
    """Accepts all that follows the schema."""
    return None


def fates(by_prompt: dict[str, list[str]]) -> Plan:
    """A plan that names what happens to the first requests with a prompt; later ones are answered."""

    def plan(prompt: str, nth: int) -> str:
        planned = by_prompt.get(prompt, [])
        return planned[nth] if nth < len(planned) else "answer"

    return plan


def rows(ledger: Path, query: str) -> list[tuple]:
    """What a third party reads in a ledger."""
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as database:
        return database.execute(query).fetchall()


def by_prompt(body: dict[str, Any]) -> Any:
    """An answer that differs where prompts do, so that requests about two latents are never the same. A judge says yes
    of all documents.
    """
    value, prompt = by_schema(body), body["messages"][0]["content"]
    if "verdicts" in value:
        count = int(prompt.partition("Which of the ")[2].partition(" ")[0])
        return {"verdicts": [value["verdicts"][0] | {"document": number} for number in range(1, count + 1)]}
    key = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return value | ({"description": f"fires on {key}"} if "description" in value else {"reason": f"because of {key}"})
