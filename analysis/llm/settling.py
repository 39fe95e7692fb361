"""From responses to outcomes: every question ends with exactly one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger, Response
from analysis.llm.messages import is_cut_off, judge
from analysis.llm.prices import dollars
from analysis.llm.questions import Question, Validate

# Seconds between lines that say how far it is.
EVERY_S = 30.0


class Settler:
    """Concludes questions from the responses that the ledger has."""

    def __init__(self, ledger: Ledger, validate: Validate, llm: LlmConfig, total: int) -> None:
        self._ledger, self._validate, self._llm = ledger, validate, llm
        self._total, self._started = total, time.monotonic()
        self._said = self._started
        # Ids of the questions that have got their outcome.
        self.settled: set[str] = set()

    def settle(self, question: Question) -> bool:
        """Concludes a question if what came counts: an answer or a refusal, or as many attempts as are allowed."""
        responses = self._ledger.responses(question)
        judged = [judge(question, response.text, self._validate) for response in responses]
        counts = [found for found in judged if found[0] in ("answered", "refused")]
        if not counts and _has_attempts(question, responses, self._llm):
            return False
        self._conclude(question, *(counts[0] if counts else judged[-1]))
        return True

    def fail(self, question: Question, reason: str) -> None:
        """Concludes a question to which no response came."""
        self._conclude(question, "failed", None, reason)

    def refuse(self, question: Question, reason: str) -> None:
        """Concludes a question that the server refuses to take, whenever it is sent."""
        self._conclude(question, "refused", None, reason)

    def _conclude(self, question: Question, outcome: str, value: dict | None, reason: str) -> None:
        self._ledger.conclude(question, outcome, value, reason)
        self.settled.add(question.id)
        now = time.monotonic()
        if now - self._said >= EVERY_S:
            self._said = now
            left = (now - self._started) * (self._total - len(self.settled)) / len(self.settled)
            print(
                f"{question.kind}: {len(self.settled)} of {self._total} questions, "
                f"{dollars(self._ledger.spent())} in all, {left / 60:.0f} min left",
                flush=True,
            )


def is_open(question: Question, ledger: Ledger, llm: LlmConfig) -> bool:
    """Whether a question is still to be asked: no outcome, no response at all, or attempts left that may mend it."""
    found = ledger.outcome(question)
    if found is None or found[0] == "failed":
        return True
    return found[0] in ("truncated", "invalid") and _has_attempts(question, ledger.responses(question), llm)


def _has_attempts(question: Question, responses: Sequence[Response], llm: LlmConfig) -> bool:
    """Whether another attempt is allowed. One that was cut off at a lower limit than today's is not held against it."""
    counted = [each for each in responses if each.max_tokens >= question.max_tokens or not is_cut_off(each.text)]
    return len(counted) < llm.max_attempts_per_answer


def settle_stored(questions: Sequence[Question], settler: Settler, ledger: Ledger) -> list[Question]:
    """Concludes what a killed run had received but not concluded, and returns the rest."""
    return [question for question in questions if not (ledger.responses(question) and settler.settle(question))]
