"""One request per question, a bounded number at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence

from anthropic import APIError, AsyncAnthropic

from analysis.llm.budget import Budget
from analysis.llm.client import Patience, fatal, is_final, is_passing, may_be_charged, said, where
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from analysis.llm.prices import priced
from analysis.llm.questions import Question
from analysis.llm.settling import Settler
from analysis.llm.stopping import Stop
from extract.errors import BadInput

# Questions that the server finds wrong before anything was answered: then the fault is not theirs.
MAX_REJECTED = 3
# Much less than a request takes.
COMMIT_EVERY_S = 0.002


class Halted(Exception):
    """There is a reason to stop, and this question is left for another run."""


class Commits:
    """One synchronous write for all that is written within a few milliseconds."""

    def __init__(self, ledger: Ledger, stop: Stop) -> None:
        self._ledger, self._stop = ledger, stop
        self._waiting: asyncio.Event | None = None

    def soon(self) -> asyncio.Event:
        """Makes what is written by now durable; set once it is."""
        if self._waiting is None:
            self._waiting = asyncio.Event()
            asyncio.get_running_loop().call_later(COMMIT_EVERY_S, self._commit)
        return self._waiting

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, None
        try:
            self._ledger.commit()
        except BadInput as error:
            self._stop.because(error)
        assert waiting
        waiting.set()


class Sender:
    """Sends questions until each has an outcome, or until there is a reason to stop."""

    def __init__(
        self, client: AsyncAnthropic, llm: LlmConfig, ledger: Ledger, settler: Settler, budget: Budget, stop: Stop
    ) -> None:
        self._client, self._llm, self._ledger, self._settler = client, llm, ledger, settler
        self._budget, self._stop, self._patience = budget, stop, Patience(stop)
        self._commits = Commits(ledger, stop)
        self._rejected = 0
        # Of questions with one prefix the first is asked alone: the others then find it in the cache.
        self._cached: dict[tuple[str, str], asyncio.Event] = {}

    async def send(self, questions: Sequence[Question], worst: dict[str, float]) -> None:
        """Asks all `questions`; `worst` is the most that each may cost, by id."""
        queue = deque(questions)
        workers = [asyncio.create_task(self._work(queue, worst)) for _ in range(self._llm.concurrency)]
        with self._ledger.grouped():
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    async def _work(self, queue: deque[Question], worst: dict[str, float]) -> None:
        while queue and not self._stop.is_set:
            question = queue.popleft()
            prefix = (question.model, question.system)
            leads = prefix not in self._cached
            cached = self._cached.setdefault(prefix, asyncio.Event())
            try:
                if not leads:
                    await cached.wait()
                await self._answer(question, worst[question.id])
            except Halted:
                return
            except BadInput as error:
                self._stop.because(error)
            finally:
                cached.set()

    async def _answer(self, question: Question, worst: float) -> None:
        """Asks until the answer counts, as often as is allowed."""
        while not self._settler.settle(question):
            if not await self._respond(question, worst):
                return

    async def _respond(self, question: Question, worst: float) -> bool:
        """Brings one response into the ledger, through all retries; or concludes the question without, and is False."""
        for retries in itertools.count():
            await self._patience.turn()
            error = await self._attempt(question, worst)
            if error is None:
                return True
            if not is_passing(error):
                self._reject(question, error)
                return False
            if retries == self._llm.max_retries:
                self._settler.fail(question, f"{said(error)}, the last of {retries + 1} attempts")
                return False
            await self._patience.back_off(error, retries)
        raise AssertionError("counting does not end")

    async def _attempt(self, question: Question, worst: float) -> APIError | None:
        """One request, which is in the ledger before it is sent; its response is soon after it came."""
        await self._budget.set_aside(worst)
        cost = 0.0
        try:
            self._check_stop()
            attempt = self._ledger.begin(question, worst=worst)
            await self._commits.soon().wait()
            self._check_stop(attempt)
            raw = await self._client.messages.with_raw_response.create(**request_of(question, self._llm))
            response = priced(await raw.text(), question.model, self._llm, batch=False)
            cost = response.usd
            self._ledger.complete(attempt, response)
        except APIError as error:
            cost = worst if may_be_charged(error) else 0.0
            self._ledger.fail(attempt, said(error), charged=cost > 0)
            return error
        finally:
            self._budget.settle(worst, cost)
            self._commits.soon()
        return None

    def _check_stop(self, attempt: int | None = None) -> None:
        if self._stop.is_set:
            if attempt is not None:
                self._ledger.fail(attempt, "not sent")
            raise Halted

    def _reject(self, question: Question, error: APIError) -> None:
        """Concludes a question that cannot be asked; BadInput if none can.

        As long as the model has answered nothing of this kind, the fault may be the settings': then it is asked again.
        """
        everywhere = fatal(error, question.model, self._llm)
        if everywhere:
            raise everywhere
        if self._ledger.has_response(question.kind, question.model):
            (self._settler.refuse if is_final(error) else self._settler.fail)(question, said(error))
            return
        self._rejected += 1
        if self._rejected >= MAX_REJECTED:
            raise BadInput(
                f"{where(self._llm)} refuses every request: {said(error)}. For a server without JSON schemas set "
                "analysis.llm.send_schema=false; for a model without effort levels, analysis.llm.effort=null."
            )
        self._settler.fail(question, said(error))
