"""Questions as message batches: created, waited for, read by the ids of their questions, whatever their order.

A batch is entered in the ledger before it is created, named when the server has answered, and closed when its results
are read. Whatever is killed in between, the next run finds it: by its name, or, where the name was lost, among the
server's batches by its size, its time and the questions in its results. So no batch is paid for twice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from anthropic import APIError, APIStatusError, AsyncAnthropic
from anthropic.types.messages import MessageBatch

from analysis.json_lines import json_text, lines_of
from analysis.llm.budget import Budget, BudgetSpent
from analysis.llm.client import Patience, fatal, is_passing, is_unsure, said, where
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger, OpenBatch
from analysis.llm.messages import request_of
from analysis.llm.prices import priced
from analysis.llm.questions import Question
from analysis.llm.settling import Settler
from analysis.llm.stopping import Stop
from extract.errors import BadInput

# The API takes 100,000 requests and 256 MB; a character has up to four bytes.
MAX_REQUESTS, MAX_CHARACTERS = 10_000, 50_000_000
# Seconds by which the clocks of the server and of this machine may differ.
CLOCK_SKEW_S = 300.0

Result = TypeVar("Result")


class Halted(Exception):
    """There is a reason to stop; a batch that was created goes on at the server."""


class Batches:
    """Asks questions by batches until each has an outcome, or until there is a reason to stop."""

    def __init__(
        self, client: AsyncAnthropic, llm: LlmConfig, ledger: Ledger, settler: Settler, budget: Budget, stop: Stop
    ) -> None:
        self._client, self._llm, self._ledger, self._settler = client, llm, ledger, settler
        self._budget, self._stop, self._patience = budget, stop, Patience(stop)
        self._errors: dict[str, list[str]] = {}
        self._rejected: dict[str, str] = {}

    async def send(self, questions: Sequence[Question], worst: dict[str, float]) -> None:
        """Asks all `questions`; `worst` is the most that each may cost, by id."""
        try:
            await self._send(list(questions), worst)
        except Halted:
            return
        except BadInput as error:
            self._stop.because(error)

    async def resume(self, questions: set[str]) -> None:
        """Reads batches that earlier runs have created, and forgets those intended and not created.

        Those without any of `questions`, such as of an older prompt, are paid for, too: they are read if they have
        ended, and count as spent at their worst until then.
        """
        try:
            for batch in self._ledger.open_batches():
                waits = not questions.isdisjoint(batch.attempts)
                if not waits and not (batch.name and await self._has_ended(batch.name)):
                    continue
                name = batch.name or await self._find(batch)
                if name is None:
                    self._ledger.end_batch(batch.number, "the batch was never created")
                else:
                    print(f"batch {name} of an earlier run holds {len(batch.attempts)} questions", flush=True)
                    await self._finish(batch.number, name)
        except Halted:
            return
        except BadInput as error:
            self._stop.because(error)

    async def _send(self, questions: list[Question], worst: dict[str, float]) -> None:
        while questions := [question for question in questions if not self._concluded(question)]:
            chosen = self._next(questions, worst)
            number = self._ledger.intend_batch(chosen, worst)
            await self._finish(number, await self._create(number, chosen))
            self._budget.spent = self._ledger.spent()

    def _concluded(self, question: Question) -> bool:
        """Whether a question has its outcome, by a response or by what keeps it from one."""
        if question.id in self._rejected:
            # As in requests of their own: final only if the model takes others of this kind.
            taken = self._ledger.has_response(question.kind, question.model)
            (self._settler.refuse if taken else self._settler.fail)(question, self._rejected[question.id])
            return True
        errors = self._errors.get(question.id, [])
        if len(errors) > self._llm.max_retries:
            self._settler.fail(question, f"{errors[-1]}, the last of {len(errors)} attempts")
            return True
        return self._settler.settle(question)

    def _next(self, questions: list[Question], worst: dict[str, float]) -> list[Question]:
        """As many questions as a batch takes and the budget allows, should each cost the most that it may."""
        chosen: list[Question] = []
        dollars, size = 0.0, 0
        for question in questions[:MAX_REQUESTS]:
            dollars += worst[question.id]
            size += len(question.system) + len(question.prompt)
            if chosen and size > MAX_CHARACTERS:
                break
            if not self._budget.allows(dollars):
                break
            chosen.append(question)
        if not chosen:
            cost, left = worst[questions[0].id], max(self._budget.left, 0)
            raise BudgetSpent(f"the next request may cost up to ${cost:.4f}, and ${left:.4f} is left")
        return chosen

    async def _create(self, number: int, questions: list[Question]) -> str:
        """The id of a new batch. After an error that may have come too late, the batch is looked for first."""
        requests: Any = [{"custom_id": each.id, "params": request_of(each, self._llm)} for each in questions]
        for retries in itertools.count():
            self._check_stop()
            try:
                created = await self._client.messages.batches.create(requests=requests)
                break
            except APIError as error:
                if not is_passing(error):
                    self._ledger.end_batch(number, said(error))
                    refusal = f"{where(self._llm)} refuses the batch: {said(error)}. Try analysis.llm.mode=sync."
                    raise fatal(error, questions[0].model, self._llm) or BadInput(refusal) from error
                if retries == self._llm.max_retries:
                    raise self._gave_up(error) from error
                await self._patience.back_off(error, retries)
                if not is_unsure(error):
                    continue
            batch = next(batch for batch in self._ledger.open_batches() if batch.number == number)
            if name := await self._find(batch):
                return name
        self._ledger.name_batch(number, created.id)
        print(f"batch {created.id} created with {len(questions)} questions; it may take up to a day", flush=True)
        return created.id

    async def _finish(self, number: int, name: str) -> None:
        """Waits for a batch and reads its results into the ledger."""
        attempts = next(batch.attempts for batch in self._ledger.open_batches() if batch.number == number)
        results = await self._results(name)
        with self._ledger.grouped():
            for question, result in results.items():
                if question in attempts:
                    self._enter(question, attempts[question], result)
        self._ledger.end_batch(number)
        for question in attempts.keys() - results.keys():
            self._errors.setdefault(question, []).append("the batch has no result for it")

    def _enter(self, question: str, attempt: int, result: dict[str, Any]) -> None:
        """One result of a batch: a response, or why there is none."""
        if result["type"] == "succeeded":
            text = json_text(result["message"])
            self._ledger.complete(attempt, priced(text, self._ledger.model_of(question), self._llm, batch=True))
            return
        error = (result.get("error") or {}).get("error") or {}
        text = f"{result['type']} in the batch" + (f": {error.get('type')} {error.get('message')}" if error else "")
        self._ledger.fail(attempt, text)
        if error.get("type") == "invalid_request_error":
            self._rejected[question] = text
        else:
            self._errors.setdefault(question, []).append(text)

    async def _has_ended(self, name: str) -> bool:
        """Whether there is nothing to wait for, which is so of a batch that the server no longer has, too."""
        batch = await self._patiently(lambda: self._client.messages.batches.retrieve(name))
        return batch is None or batch.processing_status == "ended"

    async def _results(self, name: str) -> dict[str, dict[str, Any]]:
        """Results by question id, once the batch has ended; none of a batch that the server no longer has."""
        while True:
            batch = await self._patiently(lambda: self._client.messages.batches.retrieve(name))
            if batch is None:
                print(f"batch {name} is gone: it was made with another key, or weeks ago", flush=True)
                return {}
            if batch.processing_status == "ended":
                break
            await self._stop.sleep(self._llm.poll_s)
            self._check_stop(f"batch {name} goes on at the server; the same command reads it")
        path = f"/v1/messages/batches/{name}/results"
        text = await self._patiently(lambda: self._client.get(path, cast_to=str)) or ""
        entries = [json.loads(line) for line in lines_of(text)]
        return {entry["custom_id"]: entry["result"] for entry in entries}

    async def _find(self, wanted: OpenBatch) -> str | None:
        """The server's id of a batch whose creation was not confirmed, if it was created.

        Only results name their questions; so candidates, which have the right size and time, are read, those that have
        ended first.
        """
        known, found = self._ledger.known_batches(), []
        for batch in await self._patiently(self._recent(wanted.created - CLOCK_SKEW_S)) or []:
            counts = batch.request_counts
            size = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
            if batch.id not in known and size == len(wanted.attempts):
                found.append((batch.processing_status != "ended", batch.id))
        for goes_on, name in sorted(found):
            if goes_on:
                print(
                    f"batch {name} may hold {len(wanted.attempts)} questions of this study: waiting for it", flush=True
                )
            if (await self._results(name)).keys() == wanted.attempts.keys():
                self._ledger.name_batch(wanted.number, name)
                return name
        return None

    def _recent(self, since: float) -> Callable[[], Awaitable[list[MessageBatch]]]:
        async def read() -> list[MessageBatch]:
            found = []
            async for batch in self._client.messages.batches.list(limit=100):  # the newest first
                if batch.created_at.timestamp() < since:
                    break
                found.append(batch)
            return found

        return read

    async def _patiently(self, call: Callable[[], Awaitable[Result]]) -> Result | None:
        """What a call that costs nothing returns, through retries; None for what the server does not have."""
        for retries in itertools.count():
            self._check_stop()
            try:
                return await call()
            except APIError as error:
                if isinstance(error, APIStatusError) and error.status_code == 404:
                    return None
                if not is_passing(error) or retries == self._llm.max_retries:
                    raise self._gave_up(error) from error
                await self._patience.back_off(error, retries)
        raise AssertionError("counting does not end")

    def _gave_up(self, error: APIError) -> BadInput:
        kept = "Run the same command again: it reads batches that were created before it creates others."
        return fatal(error, self._llm.model, self._llm) or BadInput(f"{where(self._llm)}: {said(error)}. {kept}")

    def _check_stop(self, note: str = "") -> None:
        if self._stop.is_set:
            print(note, end="\n" if note else "", flush=True)
            raise Halted
