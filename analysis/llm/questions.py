"""What is asked of a language model, and what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

OUTCOMES = ("answered", "refused", "truncated", "invalid", "failed")


@dataclass(frozen=True)
class Question:
    """One question to one model. Repeats differ in `repeat` alone, which the model does not see."""

    # describe | categorise | discover | detect | fuzz.
    kind: str
    # What is asked about, for people who read the ledger, such as "base_simpo/1234".
    subject: str
    repeat: int
    model: str
    # What questions of a kind share: the cached prefix.
    system: str
    prompt: str
    # JSON schema that the answer has to follow: objects, arrays, strings, numbers, booleans, enum.
    schema: dict[str, Any]
    max_tokens: int
    effort: str | None = None

    @cached_property
    def id(self) -> str:
        """sha256 of what is asked: another wording of a prompt is another question. A higher limit of the answer is
        not: what was answered within the lower one stays answered.
        """
        asked = {name: value for name, value in asdict(self).items() if name != "max_tokens"}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Length of what is shown to the model, in UTF-8: scripts differ less in tokens per byte than per character."""
        return len(self.system.encode("utf-8", "replace")) + len(self.prompt.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Answer:
    """What became of a question. `value` is the object that the schema describes if it was answered, else None."""

    # Id of the question.
    question: str
    # answered | refused | truncated | invalid | failed; a failed one (no response came) is asked again by the next run.
    outcome: str
    value: dict[str, Any] | None
    reason: str
    model: str
    # Tokens of all attempts: input_tokens, cache_read_tokens, cache_write_tokens, output_tokens.
    usage: dict[str, int] = field(default_factory=dict)
    usd: float = 0.0


# What is wrong with an answer that follows the schema, or None.
Validate = Callable[[Question, dict[str, Any]], str | None]
