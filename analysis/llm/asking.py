"""Questions to language models, each answered once and kept: what the ledger has is never paid for again.

What can be promised of a killed process: a response that is in the ledger is never asked for again, and nor is a batch
that was created; but one that was killed before the batch's name came, and run again in mode=sync while the batch goes
on, asks its questions again, and says so. Requests that were under way (at most `concurrency`) may have been answered
and lost, since the API has no key by which the same request is recognised; the ledger keeps them as attempts with the
status "sent".
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from analysis.llm.batches import Batches
from analysis.llm.budget import Budget, not_asked
from analysis.llm.client import connect
from analysis.llm.config import LlmConfig
from analysis.llm.costs import write_costs
from analysis.llm.estimating import check_budget, estimate
from analysis.llm.ledger import Ledger
from analysis.llm.preflight import check_batches, check_model
from analysis.llm.prices import dollars
from analysis.llm.questions import Answer, Question, Validate
from analysis.llm.sending import Sender
from analysis.llm.settling import Settler, is_open, settle_stored
from analysis.llm.stopping import Stop, Unasked, finish


def ask(questions: Sequence[Question], validate: Validate, llm: LlmConfig, ledger: Ledger) -> list[Answer]:
    """The answers in the order of the questions, each with exactly one outcome.

    Asks what the ledger has no answer for, after a preflight of key, model and budget, and writes `costs.csv` beside
    the ledger. Raises BadInput for what the preflight finds. Where `max_usd` is reached on the way, many requests in a
    row time out, or the server asks to wait for hours, the questions that are left fail, and another run asks them.
    """
    ledger.add(questions)
    asked = unique(questions)
    missing = [question for question in asked if is_open(question, ledger, llm)]
    settler = Settler(ledger, validate, llm, len(missing))
    missing = settle_stored(missing, settler, ledger)
    try:
        if missing:
            asyncio.run(_ask(missing, settler, llm, ledger))
    except Unasked as error:
        left = [question for question in missing if question.id not in settler.settled]
        print(
            f"{questions[0].kind}: {len(left)} of {len(asked)} questions were not asked and count as failed: {error} "
            "The same command asks for what is missing.",
            flush=True,
        )
        with ledger.grouped():
            for question in left:
                ledger.conclude(question, "failed", None, not_asked(error.reason))
    finally:
        write_costs(ledger)
    answers = {question.id: ledger.answer(question) for question in asked}
    _report(list(answers.values()), questions)
    _report_caching([answer for answer in answers.values() if answer.question in settler.settled], questions, llm)
    return [answers[question.id] for question in questions]


def unique(questions: Sequence[Question]) -> list[Question]:
    """Each question once, in order."""
    return list({question.id: question for question in questions}.values())


async def _ask(missing: list[Question], settler: Settler, llm: LlmConfig, ledger: Ledger) -> None:
    stop = Stop()
    async with connect(llm) as client:
        for model in dict.fromkeys(question.model for question in missing):
            await check_model(client, model, llm)
        batches = Batches(client, llm, ledger, settler, Budget(llm.max_usd, 0), stop)
        if llm.mode == "batch":
            await check_batches(client, llm)
        if ledger.open_batches():
            await finish(batches.resume({question.id for question in missing}), stop)
            missing = settle_stored(missing, settler, ledger)
        if not missing:
            return
        if unknown := ledger.unknown():
            print(
                f"requests whose answers never came may have cost up to {dollars(unknown)}, which counts as spent "
                "(usd_unknown in costs.csv)",
                flush=True,
            )
        found = await estimate(client, missing, llm, ledger)
        check_budget(found, missing, llm, ledger)
        budget = Budget(llm.max_usd, ledger.spent())
        way = (Batches if llm.mode == "batch" else Sender)(client, llm, ledger, settler, budget, stop)
        await finish(way.send(missing, found.worst), stop)


def _report(answers: list[Answer], questions: Sequence[Question]) -> None:
    """One line on what became of the questions, where not all were answered."""
    counts = Counter((answer.model, answer.outcome) for answer in answers)
    others = [f"{count} {outcome} ({model})" for (model, outcome), count in counts.items() if outcome != "answered"]
    if others:
        print(f"{questions[0].kind}: {len(answers)} questions, of which {', '.join(others)}", flush=True)


def _report_caching(answers: list[Answer], questions: Sequence[Question], llm: LlmConfig) -> None:
    """One line for each model that is paid for and caches nothing of what its questions share."""
    used: dict[str, list[dict[str, int]]] = {}
    for answer in answers:
        if answer.usd:
            used.setdefault(answer.model, []).append(answer.usage)
    for model, usages in used.items():
        cached = sum(usage["cache_write_tokens"] + usage["cache_read_tokens"] for usage in usages)
        if len(usages) > 1 and not cached:
            print(
                f"{questions[0].kind}: {model} cached nothing: what the {len(usages)} requests share is shorter than "
                "the least that it caches",
                flush=True,
            )
