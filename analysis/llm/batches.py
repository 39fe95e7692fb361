"""Questions as message batches: created, waited for, read by the ids of their questions, whatever their order.

A batch is entered in the ledger before it is created, named when the server has answered, and closed when its results
are read. Whatever is killed in between, the next run finds it: by its name, or, where the name was lost, among the
server's batches by its size, its time and the questions in its results. So no batch is paid for twice, with one
exception, which is said: mode=sync does not wait for one whose name was lost, but asks its questions again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from anthropic import APIError, APIStatusError, AsyncAnthropic
from anthropic.types.messages import MessageBatch

from analysis.json_lines import json_text, lines_of
from analysis.llm.budget import Budget
from analysis.llm.client import Patience, fatal, is_passing, is_unsure, said, where
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger, OpenBatch
from analysis.llm.messages import request_of
from analysis.llm.prices import priced
from analysis.llm.questions import Question
from analysis.llm.settling import Settler
from analysis.llm.stopping import Halted, Stop
from extract.errors import BadInput

# The API takes 100,000 requests and 256 MB.
MAX_REQUESTS, MAX_BYTES = 10_000, 200_000_000
# Seconds between lines that say what is waited for.
SAY_S = 600.0
# Seconds by which the clocks of the server and of this machine may differ.
CLOCK_SKEW_S = 300.0

Result = TypeVar("Result")


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
        ended, and count as spent at their worst until then. So do, unless this run creates batches, those whose names
        were lost, while one that may be theirs goes on: their questions are asked again, which is said.
        """
        try:
            for batch in self._ledger.open_batches():
                names = [batch.name] if batch.name else await self._candidates(batch)
                wanted = questions & batch.attempts.keys()
                waits = wanted and (batch.name or self._llm.mode == "batch")
                going_on = [] if waits else [name for name in names if not await self._has_ended(name)]
                if going_on:
                    if wanted:
                        _say_asked_again(going_on, len(wanted))
                    continue
                name = batch.name or await self._find(batch, names)
                if name is None:
                    self._ledger.end_batch(batch.number, "the batch was never created")
                else:
                    print(f"batch {name} of an earlier run holds {len(batch.attempts)} questions", flush=True)
                    await self._finish(batch, name)
        except Halted:
            return
        except BadInput as error:
            self._stop.because(error)

    async def _send(self, questions: list[Question], worst: dict[str, float]) -> None:
        while questions := [question for question in questions if not self._concluded(question)]:
            chosen = self._next(questions, worst)
            batch = self._ledger.intend_batch(chosen, worst)
            await self._finish(batch, await self._create(batch, chosen))
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
            size += question.num_bytes
            if chosen and size > MAX_BYTES or not self._budget.allows(dollars):
                break
            chosen.append(question)
        if not chosen:
            raise self._budget.spent_up(worst[questions[0].id])
        return chosen

    async def _create(self, batch: OpenBatch, questions: list[Question]) -> str:
        """The id of a new batch. After an error that may have come too late, the batch is looked for first."""
        requests: Any = [{"custom_id": each.id, "params": request_of(each, self._llm)} for each in questions]
        unsure = False

        async def create() -> str:
            nonlocal unsure
            if unsure and (name := await self._find(batch, await self._candidates(batch))):
                return name
            try:
                created = await self._client.messages.batches.create(requests=requests)
            except APIError as error:
                unsure = is_unsure(error)
                raise
            self._ledger.name_batch(batch.number, created.id)
            print(f"batch {created.id} created with {len(questions)} questions; it may take up to a day", flush=True)
            return created.id

        try:
            return await self._patience.retried(create, self._llm.max_retries)
        except APIError as error:
            if is_passing(error):
                raise self._gave_up(error) from error
            self._ledger.end_batch(batch.number, said(error))
            refusal = f"{where(self._llm)} refuses the batch: {said(error)}. Try analysis.llm.mode=sync."
            raise fatal(error, questions[0].model, self._llm) or BadInput(refusal) from error

    async def _finish(self, batch: OpenBatch, name: str) -> None:
        """Waits for a batch and reads its results into the ledger."""
        results = await self._results(name)
        with self._ledger.grouped():
            for question, result in results.items():
                if question in batch.attempts:
                    self._enter(question, batch.attempts[question], result)
        self._ledger.end_batch(batch.number)
        for question in batch.attempts.keys() - results.keys():
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
        last_said = time.monotonic()
        while True:
            batch = await self._patiently(lambda: self._client.messages.batches.retrieve(name))
            if batch is None:
                print(f"batch {name} is gone: it was made with another key, or weeks ago", flush=True)
                return {}
            if batch.processing_status == "ended":
                break
            if time.monotonic() - last_said >= SAY_S:
                last_said = time.monotonic()
                print(f"batch {name}: {batch.request_counts.processing} questions are not answered yet", flush=True)
            await self._stop.sleep(self._llm.poll_s)
            if self._stop.is_set:
                print(f"batch {name} goes on at the server; the same command reads it", flush=True)
        path = f"/v1/messages/batches/{name}/results"
        text = await self._patiently(lambda: self._client.get(path, cast_to=str)) or ""
        entries = [json.loads(line) for line in lines_of(text)]
        return {entry["custom_id"]: entry["result"] for entry in entries}

    async def _candidates(self, wanted: OpenBatch) -> list[str]:
        """Batches of the server that may be one whose creation was not confirmed, by size and time; ended ones first.

        Their sizes spare waiting for others: only results, which come at the end, name their questions.
        """
        known, found = self._ledger.known_batches(), []
        for batch in await self._patiently(self._recent(wanted.created - CLOCK_SKEW_S)) or []:
            counts = batch.request_counts
            size = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
            if batch.id not in known and size == len(wanted.attempts):
                found.append((batch.processing_status != "ended", batch.id))
        return [name for _, name in sorted(found)]

    async def _find(self, wanted: OpenBatch, names: list[str]) -> str | None:
        """The one of these batches that holds the wanted questions, once it has ended."""
        for name in names:
            if not await self._has_ended(name):
                print(
                    f"batch {name} may hold {len(wanted.attempts)} questions of this study, which would be paid for "
                    "twice: waiting for it to end, up to a day. analysis.llm.mode=sync does not wait",
                    flush=True,
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
        try:
            return await self._patience.retried(call, self._llm.max_retries)
        except APIError as error:
            if isinstance(error, APIStatusError) and error.status_code == 404:
                return None
            raise self._gave_up(error) from error

    def _gave_up(self, error: APIError) -> BadInput:
        kept = "Run the same command again: it reads batches that were created before it creates others."
        return fatal(error, self._llm.model, self._llm) or BadInput(f"{where(self._llm)}: {said(error)}. {kept}")


def _say_asked_again(names: list[str], count: int) -> None:
    """One line on questions of a batch whose name was lost, where it is not waited for."""
    print(
        f"batch {' or '.join(names)} may hold {count} questions of this study, which are asked again now and may be "
        "paid for twice. analysis.llm.mode=batch waits for it",
        flush=True,
    )
