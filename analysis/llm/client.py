"""The connection to the Messages API, and what its errors mean: wait and send again, give up one question, or stop."""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from anthropic import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncAnthropic

from analysis.llm.config import LlmConfig
from analysis.llm.stopping import Stop
from extract.errors import BadInput

TOKEN_VARIABLE = "ANTHROPIC_AUTH_TOKEN"
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 60.0
# What the next request would meet as well: no key, no money, no right, no such model.
FATAL = (401, 402, 403, 404)
# Times that a request which costs nothing is sent again.
FREE_RETRIES = 2

Result = TypeVar("Result")


def connect(llm: LlmConfig) -> AsyncAnthropic:
    """A client that never retries by itself: every attempt is entered in the ledger. BadInput without a key."""
    key, token = os.environ.get(llm.key_variable), os.environ.get(TOKEN_VARIABLE)
    if not key and not token and not llm.base_url:
        raise BadInput(
            f"No key: the environment variable {llm.key_variable} (analysis.llm.key_variable) is not set. Export it, "
            "set analysis.llm.base_url to a local server, or use analysis.annotate.annotator=offline."
        )
    return AsyncAnthropic(
        api_key=key or (None if token else "none"),
        auth_token=None if key else token,
        base_url=llm.base_url,
        max_retries=0,
        timeout=llm.timeout_s,
    )


def where(llm: LlmConfig) -> str:
    """The server, for messages."""
    return f"the server at {llm.base_url} (analysis.llm.base_url)" if llm.base_url else "the API"


def said(error: APIError) -> str:
    """An error in one line: its status and what the server wrote."""
    if isinstance(error, APIStatusError):
        return f"{error.status_code} {' '.join((error.api_message or error.message).split())[:300]}"
    kind = "timed out" if isinstance(error, APITimeoutError) else "connection lost"
    return f"{kind}: {str(error.__cause__ or error).rstrip('.')}"


def is_passing(error: APIError) -> bool:
    """Whether the same request may succeed later: timeouts, lost connections, 408, 409, 429, 5xx (529 included)."""
    if isinstance(error, APIStatusError):
        told = error.response.headers.get("x-should-retry")
        if told in ("true", "false"):
            return told == "true"
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError)


def fatal(error: APIError, model: str, llm: LlmConfig) -> BadInput | None:
    """What to tell the user of an error that every other request would meet as well."""
    if not isinstance(error, APIStatusError) or error.status_code not in FATAL:
        return None
    remedy = {
        401: f"Check the key in {llm.key_variable} (analysis.llm.key_variable).",
        402: "Check the account's credit; what is answered is kept.",
        403: f"The key in {llm.key_variable} may not use this model: choose another analysis.llm.model.",
        404: "Choose a model that is served: analysis.llm.model, or analysis.llm.second_model if it is that one.",
    }[error.status_code]
    return BadInput(f"{where(llm)} refuses requests to the model {model} ({said(error)}). {remedy}")


def retry_after(error: APIError) -> float | None:
    """Seconds that the server asks to wait, whether it says milliseconds, seconds or a date."""
    headers = error.response.headers if isinstance(error, APIStatusError) else {}
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds:
            return max(0.0, float(milliseconds) / 1000)
        return max(0.0, float(text)) if text else None
    except ValueError:
        date = email.utils.parsedate_tz(text)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


class Patience:
    """When to send again. What one request is told, all hold to: a limit on the rate is a limit for all."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._not_before = 0.0

    async def turn(self) -> None:
        """Waits while the server has asked for it."""
        while not self._stop.is_set and (left := self._not_before - asyncio.get_running_loop().time()) > 0:
            await self._stop.sleep(left + random.uniform(0, 0.1))

    async def back_off(self, error: APIError, retries: int) -> None:
        """Waits as long as the server asks, else twice as long as before, with jitter."""
        asked = retry_after(error)
        if asked is not None:
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + asked)
            await self.turn()
        else:
            await self._stop.sleep(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**retries) * random.uniform(0.75, 1))


def unreachable(error: APIError, model: str, llm: LlmConfig) -> BadInput:
    """What to tell the user of an error of a request that checks whether others can be sent."""
    remedy = "Start it, or correct analysis.llm.base_url." if llm.base_url else "Try again later."
    return fatal(error, model, llm) or BadInput(f"{where(llm)} does not answer ({said(error)}). {remedy}")


async def patiently(call: Callable[[], Awaitable[Result]]) -> Result:
    """What a call that costs nothing returns, sent again a few times."""
    patience = Patience(Stop())
    for retries in range(FREE_RETRIES):
        try:
            return await call()
        except APIError as error:
            if not is_passing(error):
                raise
            await patience.back_off(error, retries)
    return await call()
