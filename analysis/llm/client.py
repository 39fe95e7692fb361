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
from analysis.llm.stopping import Stop, Unasked
from extract.errors import BadInput

TOKEN_VARIABLE = "ANTHROPIC_AUTH_TOKEN"
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 60.0
# Waits that the server asks for: what is said, and what is not waited for.
SAID_S, TOO_LONG_S = 60.0, 600.0
# What the next request would meet as well: no key, no money, no right, no such model.
FATAL = (401, 402, 403, 404)
# What the same request would meet again, and others need not.
FINAL = (400, 413, 422)
# Times that a request which costs nothing is sent again.
FREE_RETRIES = 2

Result = TypeVar("Result")


def connect(llm: LlmConfig) -> AsyncAnthropic:
    """A client that never retries by itself: every attempt is entered in the ledger. BadInput without a key."""
    key, token = _secret(llm.key_variable), _secret(TOKEN_VARIABLE)
    if not key and not token and not llm.base_url:
        raise BadInput(
            f"No key: the environment variable {llm.key_variable} (analysis.llm.key_variable) is not set. Export it, "
            "set analysis.llm.base_url to a local server, or use analysis.annotate.annotator=offline."
        )
    return AsyncAnthropic(
        api_key=key or (None if token else "none"),
        auth_token=None if key or not token else token,
        # Local servers print an address with the path that the client adds.
        base_url=llm.base_url and llm.base_url.rstrip("/").removesuffix("/v1"),
        max_retries=0,
        timeout=llm.timeout_s,
    )


def _secret(variable: str) -> str:
    """What a variable holds, without the line end of a mounted file. BadInput, which does not show it, if no header can
    carry it.
    """
    secret = os.environ.get(variable, "").strip()
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise BadInput(
            f"The key in the environment variable {variable} holds blanks, line ends or characters beyond ASCII, which "
            "no key has. Export the key alone."
        )
    return secret


def where(llm: LlmConfig) -> str:
    """The server, for messages."""
    return f"the server at {llm.base_url} (analysis.llm.base_url)" if llm.base_url else "the API"


def said(error: APIError) -> str:
    """An error in one line: its status and what the server wrote."""
    if isinstance(error, APIStatusError):
        return f"{error.status_code} {' '.join((error.api_message or error.message).split())[:300]}"
    if isinstance(error, APITimeoutError):
        return "timed out; raise analysis.llm.timeout_s if answers take longer"
    # Of errors within a request that was not sent, such as headers that cannot be, the text may hold a key.
    cause = error.__cause__
    return f"connection lost: {type(cause).__name__ if cause else str(error).rstrip('.')}"


def may_be_charged(error: APIError) -> bool:
    """Whether the request may have been answered all the same: it was sent, and nothing is known of what came of it."""
    cause = type(error.__cause__).__name__
    return isinstance(error, APIConnectionError) and cause not in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def is_unsure(error: APIError) -> bool:
    """Whether the server may have done what it was asked to: it did not answer, or failed within."""
    if isinstance(error, APIStatusError):
        return error.status_code >= 500 and error.status_code != 529
    return may_be_charged(error)


def is_final(error: APIError) -> bool:
    """Whether the server finds fault with this one request, as it will whenever it is sent: too long, or blocked."""
    return isinstance(error, APIStatusError) and error.status_code in FINAL


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
    if not isinstance(error, APIStatusError):
        return None
    # The API has said that there is no money with the status of a wrong request, too.
    status = 402 if error.status_code == 400 and "credit balance" in said(error) else error.status_code
    if status not in FATAL:
        return None
    remedy = {
        401: f"Check the key in {llm.key_variable} (analysis.llm.key_variable).",
        402: "Check the account's credit; what is answered is kept.",
        403: f"The key in {llm.key_variable} may not use this model: choose another analysis.llm.model.",
        404: "Choose a model that is served: analysis.llm.model, or analysis.llm.second_model if it is that one.",
    }[status]
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

    async def retried(self, call: Callable[[], Awaitable[Result]], most: int) -> Result:
        """What `call` returns, sent again up to `most` times after errors that may pass; raises the last of them, and
        Halted once there is a reason to stop.
        """
        retries = 0
        while True:
            await self.turn()
            self._stop.check()
            try:
                return await call()
            except APIError as error:
                if retries >= most or not is_passing(error):
                    raise
                await self._back_off(error, retries)
            retries += 1

    async def _back_off(self, error: APIError, retries: int) -> None:
        """Waits twice as long as before, with jitter, or as long as the server asks; Unasked if that is too long."""
        asked, now = retry_after(error), asyncio.get_running_loop().time()
        if asked is None:
            await self._stop.sleep(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**retries) * random.uniform(0.75, 1))
            return
        wait = f"the server asks to wait {asked / 60:,.0f} min ({said(error)})"
        if asked > TOO_LONG_S:
            raise Unasked(wait, "Wait that long, or have the limits of the account raised.")
        if asked > SAID_S and self._not_before <= now:
            print(f"{wait}: waiting", flush=True)
        self._not_before = max(self._not_before, now + asked)


def unreachable(error: APIError, model: str, llm: LlmConfig) -> BadInput:
    """What to tell the user of an error of a request that checks whether others can be sent."""
    remedy = "Start it, or correct analysis.llm.base_url." if llm.base_url else "Try again later."
    return fatal(error, model, llm) or BadInput(f"{where(llm)} does not answer ({said(error)}). {remedy}")


async def patiently(call: Callable[[], Awaitable[Result]]) -> Result:
    """What a call that costs nothing returns, sent again a few times."""
    return await Patience(Stop()).retried(call, FREE_RETRIES)
