"""What questions will cost, and whether the budget suffices."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from anthropic import APIError, APIStatusError, AsyncAnthropic

from analysis.llm.client import patiently, unreachable
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from analysis.llm.prices import BATCH_FACTOR, MILLION, Price, dollars, price_of
from analysis.llm.questions import Question
from extract.errors import BadInput

# Questions of each kind and model whose tokens are counted by the server; the others by their length.
SAMPLE = 4
# Where no server counts: few texts have fewer characters per token.
CHARACTERS_PER_TOKEN = 3.0
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
        rate = await _tokens_per_character(client, members, llm)
        output = ledger.mean_output(kind, model) or min(EXPECTED_OUTPUT, members[0].max_tokens)
        price, factor = price_of(model, llm), BATCH_FACTOR if llm.mode == "batch" else 1.0
        for question in members:
            tokens = rate * _length(question)
            worst[question.id] = factor * _dollars(price, tokens, question.max_tokens)
            expected = factor * (tokens * price.input + output * price.output) / MILLION
            total = [a + b for a, b in zip(total, (tokens, output, expected), strict=True)]
    input_tokens, output_tokens, usd = total
    return Estimate(input_tokens, output_tokens, usd, worst)


def _dollars(price: Price, input_tokens: float, output_tokens: float) -> float:
    return (input_tokens * max(price.input, price.cache_write) + output_tokens * price.output) / MILLION


def _length(question: Question) -> int:
    return len(question.system) + len(question.prompt)


async def _tokens_per_character(client: AsyncAnthropic, questions: list[Question], llm: LlmConfig) -> float:
    """The highest rate of a sample: of the longest question and some shorter ones."""
    ordered = sorted(questions, key=_length)
    chosen = {round(i * (len(ordered) - 1) / (SAMPLE - 1)) for i in range(SAMPLE)}
    try:
        counts = await asyncio.gather(*(_counted(client, ordered[index], llm) for index in chosen))
        return max(count / _length(ordered[index]) for count, index in zip(counts, chosen, strict=True))
    except APIError as error:
        if llm.base_url and not (isinstance(error, APIStatusError) and error.status_code in (401, 403)):
            return 1 / CHARACTERS_PER_TOKEN
        raise unreachable(error, questions[0].model, llm) from error


async def _counted(client: AsyncAnthropic, question: Question, llm: LlmConfig) -> int:
    body = request_of(question, llm)
    del body["max_tokens"]
    counted = await patiently(lambda: client.messages.count_tokens(**body))
    return counted.input_tokens


def check_budget(found: Estimate, questions: Sequence[Question], llm: LlmConfig, spent: float) -> None:
    """Says what questions will cost; BadInput if that is more than is left."""
    models = ", ".join(dict.fromkeys(question.model for question in questions))
    text = (
        f"{questions[0].kind}: {len(questions)} questions to {models}, about {found.input_tokens:,.0f} tokens in and "
        f"{found.output_tokens:,.0f} out: {dollars(found.usd)}"
    )
    before = f" ({dollars(spent)} are spent already)" if spent else ""
    if found.usd > llm.max_usd - spent:
        raise BadInput(
            f"{text}, more than analysis.llm.max_usd ({dollars(llm.max_usd)}){before} allows. Raise it to at least "
            f"${(found.usd + spent) * 1.1 + 0.01:.2f}, choose a cheaper analysis.llm.model, or halve the price by "
            "analysis.llm.mode=batch."
        )
    print(f"{text} of analysis.llm.max_usd {dollars(llm.max_usd)}{before}", flush=True)
