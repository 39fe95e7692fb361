"""One request per question, a bounded number at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from anthropic import APIError, APITimeoutError, AsyncAnthropic

from analysis.llm.budget import Budget
from analysis.llm.client import Patience, fatal, is_final, is_passing, may_be_charged, said, where
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from analysis.llm.prices import priced
from analysis.llm.questions import Question
from analysis.llm.settling import Settler
from analysis.llm.stopping import Halted, Stop, Unasked
from extract.errors import BadInput

# Questions that the server finds wrong before anything was answered: then the fault is not theirs.
MAX_REJECTED = 3
# Timeouts in a row, for each request that may be under way: then the next one will time out, too. All attempts at one
# question are not many.
TIMEOUTS_EACH = 2
# Much less than a request takes.
COMMIT_EVERY_S = 0.002


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
        self._rejected = self._timeouts = 0
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
        try:
            await self._patience.retried(lambda: self._attempt(question, worst), self._llm.max_retries)
        except APIError as error:
            if is_passing(error):
                attempts = self._llm.max_retries + 1
                self._settler.fail(question, f"{said(error)}, the last of {attempts} attempts")
            else:
                self._reject(question, error)
            return False
        return True

    async def _attempt(self, question: Question, worst: float) -> None:
        """One request, which is in the ledger before it is sent; its response is soon after it came."""
        await self._budget.set_aside(worst)
        cost = 0.0
        try:
            self._stop.check()
            attempt = self._ledger.begin(question, worst=worst)
            await self._commits.soon().wait()
            if self._stop.is_set:  # as where the disk did not take the attempt
                self._ledger.fail(attempt, "not sent")
                raise Halted
            raw = await self._client.messages.with_raw_response.create(**request_of(question, self._llm))
            response = priced(await raw.text(), question.model, self._llm, batch=False)
            cost = response.usd
            self._ledger.complete(attempt, response)
            self._timeouts = 0
        except APIError as error:
            cost = worst if may_be_charged(error) else 0.0
            self._ledger.fail(attempt, said(error), charged=cost > 0)
            self._count_timeouts(error)
            raise
        finally:
            self._budget.settle(worst, cost)
            self._commits.soon()

    def _count_timeouts(self, error: APIError) -> None:
        """Unasked after many timeouts in a row: each may be charged for, and so may all that follow."""
        self._timeouts = self._timeouts + 1 if isinstance(error, APITimeoutError) else 0
        if self._timeouts > max(TIMEOUTS_EACH * self._llm.concurrency, self._llm.max_retries + 1):
            raise Unasked(
                f"{self._timeouts} requests in a row had no answer within analysis.llm.timeout_s "
                f"({self._llm.timeout_s:g})",
                f"Raise it, or see whether {where(self._llm)} is at work. What they may have cost counts as spent "
                "(usd_unknown in costs.csv).",
            )

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
