"""How language models are asked: which, where, how many requests at a time, and what they may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from extract.errors import BadInput

MODES = ("sync", "batch")
EFFORTS = (None, "low", "medium", "high", "xhigh", "max")


@dataclass
class LlmConfig:
    """The section `analysis.llm` of the settings."""

    # Name of the model that describes latents and puts them into categories.
    model: str = "claude-sonnet-5-5"
    # A second model that does the same work, so that agreement between models can be measured; null asks none.
    second_model: str | None = None
    # Address of another server with the Messages API, such as vLLM's (http://localhost:8000); null is Anthropic's.
    base_url: str | None = None
    # Environment variable that holds the key. Servers at `base_url` may need none.
    key_variable: str = "ANTHROPIC_API_KEY"
    # "sync": one request per question, `concurrency` at a time. "batch": message batches, half the price, within a day.
    mode: str = "sync"
    # Requests that are under way together.
    concurrency: int = 8
    # Dollars that all requests of the study may cost, those in its requests.sqlite included.
    max_usd: float = 10.0
    # How often a request is sent again after 408, 409, 429, 5xx, a lost connection or a timeout.
    max_retries: int = 6
    # Seconds until a request without an answer counts as timed out.
    timeout_s: float = 300.0
    # Times that each question is put to each model; the first answer counts, the others measure agreement.
    repeats: int = 1
    # Tokens that an answer may have, those that a model thinks with included.
    max_tokens: int = 4096
    # How often a question is put until its answer is neither cut off nor invalid.
    max_attempts_per_answer: int = 2
    # How much a model thinks ("low" ... "max"); null leaves it to the model.
    effort: str | None = None
    # Whether requests carry the JSON schema of the answer, which some local servers refuse. Answers are checked always.
    send_schema: bool = True
    # Seconds between looks at a message batch.
    poll_s: float = 30.0
    # Prices that are not built in or differ, {model: [input, output, cache write, cache read]} in dollars per million
    # tokens. Models at `base_url` without a price are free.
    prices: dict[str, list[Any]] = field(default_factory=dict)  # of float, Hydra would refuse whole numbers

    @property
    def models(self) -> list[str]:
        """The annotators, the primary one first."""
        return [self.model] + ([self.second_model] if self.second_model else [])

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that answers depend on: not where, how fast or at what price they are given."""
        names = ("models", "repeats", "max_tokens", "effort", "send_schema", "max_attempts_per_answer")
        return {name: getattr(self, name) for name in names}


def check_llm(llm: LlmConfig) -> None:
    """Raises BadInput for the first field of the section `analysis.llm` that cannot be used."""
    for name in ("concurrency", "repeats", "max_tokens", "max_attempts_per_answer"):
        if getattr(llm, name) < 1:
            raise BadInput(f"analysis.llm.{name} ({getattr(llm, name)}) must be at least 1.")
    for name in ("timeout_s", "poll_s"):
        if not 0 < getattr(llm, name) < math.inf:
            raise BadInput(f"analysis.llm.{name} ({getattr(llm, name)}) must be positive.")
    for name in ("max_usd", "max_retries"):
        if not 0 <= getattr(llm, name) < math.inf:
            raise BadInput(f"analysis.llm.{name} ({getattr(llm, name)}) must be a number from 0 on.")
    if llm.mode not in MODES:
        raise BadInput(f'analysis.llm.mode ({llm.mode}) must be "sync" or "batch".')
    if llm.effort not in EFFORTS:
        raise BadInput(f"analysis.llm.effort ({llm.effort}) must be null or one of {', '.join(map(str, EFFORTS[1:]))}.")
    if not llm.model:
        raise BadInput("analysis.llm.model is empty. Name a model, such as claude-sonnet-5-5.")
    if llm.second_model == llm.model:
        raise BadInput(
            f"analysis.llm.second_model ({llm.second_model}) is the first model too. To compare answers of one model "
            "with each other, set analysis.llm.repeats."
        )
    for model, price in llm.prices.items():
        if len(price) != 4 or not all(isinstance(usd, int | float) and 0 <= usd < math.inf for usd in price):
            raise BadInput(
                f"analysis.llm.prices: that of {model} ({price}) must be four numbers: dollars per million tokens of "
                "input, output, cache write and cache read."
            )
