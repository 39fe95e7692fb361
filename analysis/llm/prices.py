"""What requests cost."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Response
from analysis.llm.messages import usage_of
from extract.errors import BadInput

MILLION = 1_000_000
# Message batches cost half.
BATCH_FACTOR = 0.5


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float
    output: float
    cache_write: float
    cache_read: float

    def of(self, usage: dict[str, int]) -> float:
        """Dollars of the tokens that a response says it used."""
        cached = usage["cache_write_tokens"] * self.cache_write + usage["cache_read_tokens"] * self.cache_read
        return self.expected(usage["input_tokens"], usage["output_tokens"]) + cached / MILLION

    def expected(self, input_tokens: float, output_tokens: float) -> float:
        """Dollars where nothing is cached."""
        return (input_tokens * self.input + output_tokens * self.output) / MILLION

    def worst(self, input_tokens: float, output_tokens: float) -> float:
        """Dollars where all of the input is written to the cache, if that is dearer."""
        return replace(self, input=max(self.input, self.cache_write)).expected(input_tokens, output_tokens)


# List prices of November 2026 (https://platform.claude.com/docs/en/about-claude/pricing); cache writes live 5 minutes.
PRICES = {
    "claude-opus-5-5": Price(4.0, 20.0, 5.0, 0.2),
    "claude-sonnet-5-5": Price(2.0, 10.0, 2.5, 0.1),
    "claude-haiku-5-5": Price(0.1, 0.5, 0.125, 0.01),
    "claude-opus-5": Price(5.0, 25.0, 6.25, 0.5),
    "claude-sonnet-5": Price(2.0, 10.0, 2.5, 0.2),
    "claude-opus-4-8": Price(5.0, 25.0, 6.25, 0.5),
    "claude-haiku-4-5": Price(1.0, 5.0, 1.25, 0.1),
}
FREE = Price(0.0, 0.0, 0.0, 0.0)


def dollars(usd: float) -> str:
    """An amount for people: cents, or hundredths of cents where less than a dollar has such."""
    return f"${usd:.2f}" if usd >= 1 or usd == round(usd, 2) else f"${usd:.4f}"


def price_of(model: str, llm: LlmConfig, batch: bool = False) -> Price:
    """The price of a model by the settings, else the built-in one, in a batch or not; BadInput if there is none."""
    if batch:
        return Price(*(BATCH_FACTOR * usd for usd in astuple(price_of(model, llm))))
    if model in llm.prices:
        return Price(*llm.prices[model])
    if llm.base_url:
        return FREE
    if model not in PRICES:
        raise BadInput(
            f"No price of the model {model} is known, so that analysis.llm.max_usd ({llm.max_usd}) cannot be kept. Add "
            f"'+analysis.llm.prices={{{model}:[INPUT,OUTPUT,CACHE_WRITE,CACHE_READ]}}' in dollars per million "
            f"tokens; built in are those of {', '.join(PRICES)}."
        )
    return PRICES[model]


def priced(text: str, model: str, llm: LlmConfig, batch: bool) -> Response:
    """A raw response with what it used and cost."""
    message, usage = usage_of(text)
    return Response(text, message, usage, price_of(model, llm, batch).of(usage))
