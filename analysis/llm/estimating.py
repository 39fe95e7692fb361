"""What questions will cost, and whether the budget suffices."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from anthropic import APIError, APIStatusError, AsyncAnthropic

from analysis.llm.budget import not_asked, reached
from analysis.llm.client import patiently, unreachable
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from analysis.llm.prices import dollars, price_of
from analysis.llm.questions import Question
from analysis.llm.stopping import Unasked
from extract.errors import BadInput

# Questions of each kind and model whose tokens are counted by the server; the others by their length.
SAMPLE = 4
# Where no server counts: few texts have fewer bytes per token.
BYTES_PER_TOKEN = 3.0
# Tokens of an answer, thinking included, until the ledger has seen answers of its kind.
EXPECTED_OUTPUT = 800


@dataclass(frozen=True)
class Estimate:
    """What questions will take: dollars as expected, and the most that each may cost, by id."""

    input_tokens: float
    output_tokens: float
    usd: float
    worst: dict[str, float]


async def estimate(client: AsyncAnthropic, questions: Sequence[Question], llm: LlmConfig, ledger: Ledger) -> Estimate:
    """Of questions that are to be asked. Nothing is taken off for cached prefixes, and little for short answers."""
    groups: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.kind, question.model].append(question)
    total, worst = [0.0, 0.0, 0.0], {}
    for (kind, model), members in groups.items():
        rate = await _tokens_per_byte(client, members, llm)
        output = ledger.mean_output(kind, model) or min(EXPECTED_OUTPUT, members[0].max_tokens)
        price = price_of(model, llm, batch=llm.mode == "batch")
        for question in members:
            tokens = rate * question.num_bytes
            worst[question.id] = price.worst(tokens, question.max_tokens)
            expected = price.expected(tokens, output)
            total = [a + b for a, b in zip(total, (tokens, output, expected), strict=True)]
    input_tokens, output_tokens, usd = total
    return Estimate(input_tokens, output_tokens, usd, worst)


async def _tokens_per_byte(client: AsyncAnthropic, questions: list[Question], llm: LlmConfig) -> float:
    """The highest rate of a sample: of the longest question, some shorter ones, and the one least in Latin script."""
    ordered = sorted(questions, key=lambda question: question.num_bytes)
    chosen = {round(i * (len(ordered) - 1) / (SAMPLE - 1)) for i in range(SAMPLE)}
    chosen.add(max(range(len(ordered)), key=lambda index: ordered[index].num_bytes / len(ordered[index].prompt)))
    try:
        counts = await asyncio.gather(*(_counted(client, ordered[index], llm) for index in chosen))
        return max(count / ordered[index].num_bytes for count, index in zip(counts, chosen, strict=True))
    except APIError as error:
        if llm.base_url and not (isinstance(error, APIStatusError) and error.status_code in (401, 403)):
            return 1 / BYTES_PER_TOKEN
        raise unreachable(error, questions[0].model, llm) from error


async def _counted(client: AsyncAnthropic, question: Question, llm: LlmConfig) -> int:
    body = request_of(question, llm)
    del body["max_tokens"]
    counted = await patiently(lambda: client.messages.count_tokens(**body))
    return counted.input_tokens


def check_budget(found: Estimate, questions: Sequence[Question], llm: LlmConfig, ledger: Ledger) -> None:
    """Says what questions will cost; BadInput if that is more than is left.

    Where an earlier step has met the same limit, Unasked: then the run goes on to its end, to show what is lost.
    """
    spent = ledger.spent()
    models = ", ".join(dict.fromkeys(question.model for question in questions))
    text = (
        f"{questions[0].kind}: {len(questions)} questions to {models}, about {found.input_tokens:,.0f} tokens in and "
        f"{found.output_tokens:,.0f} out: {dollars(found.usd)}"
    )
    if found.usd > llm.max_usd - spent:
        enough = f"Raise it to at least ${(found.usd + spent) * 1.1 + 0.01:.2f}"
        if ledger.has_failed(not_asked(reached(llm.max_usd))):
            raise Unasked(reached(llm.max_usd), f"{enough}.")
        raise BadInput(
            f"{text}, more than analysis.llm.max_usd ({dollars(llm.max_usd)}, of which {dollars(spent)} are spent) "
            f"allows. {enough}, choose a cheaper analysis.llm.model, or halve the price by analysis.llm.mode=batch."
        )
    print(f"{text}; {dollars(spent)} of {dollars(llm.max_usd)} (analysis.llm.max_usd) are spent", flush=True)
