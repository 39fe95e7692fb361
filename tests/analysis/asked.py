"""Questions for the stub of the Messages API, and settings that reach it."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

from analysis.llm.config import LlmConfig
from analysis.llm.prompting import object_schema
from analysis.llm.questions import Question
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
    """An answer that differs where prompts do, so that requests about two latents are never the same."""
    value = by_schema(body)
    key = hashlib.sha256(body["messages"][0]["content"].encode()).hexdigest()[:12]
    return value | ({"description": f"fires on {key}"} if "description" in value else {"reason": f"because of {key}"})
