"""What is checked before anything is paid for: the key, the server, and whether it has the models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from anthropic import APIError, APIStatusError, AsyncAnthropic

from analysis.llm.client import connect, patiently, unreachable, where
from analysis.llm.config import LlmConfig
from analysis.llm.prices import price_of
from extract.errors import BadInput

# What servers without an endpoint say.
NO_ENDPOINT = (404, 405, 501)


def check_access(llm: LlmConfig, models: Sequence[str] = ()) -> None:
    """BadInput if one of the models (by default the annotators) could answer no request: no key, no price, no server, a
    model that does not exist or is retired.
    """
    asyncio.run(_check_access(llm, models or llm.models))


async def _check_access(llm: LlmConfig, models: Sequence[str]) -> None:
    async with connect(llm) as client:
        for model in models:
            await check_model(client, model, llm)
            price_of(model, llm)


async def check_model(client: AsyncAnthropic, model: str, llm: LlmConfig) -> None:
    """BadInput unless the server has the model, and it is not retired. Local servers need not know their models."""
    try:
        info = await patiently(lambda: client.models.retrieve(model))
    except APIError as error:
        if llm.base_url and isinstance(error, APIStatusError) and error.status_code in NO_ENDPOINT:
            await _check_list(client, model, llm)
            return
        if isinstance(error, APIStatusError) and error.status_code == 404:
            raise BadInput(f"{_named(model, llm)} does not exist. {await _others(client)}") from error
        raise unreachable(error, model, llm) from error
    lifecycle = getattr(info, "lifecycle", None)
    if lifecycle == "retired":
        raise BadInput(f"{_named(model, llm)} is retired and answers no more. {await _others(client)}")
    if lifecycle == "deprecated":
        print(f"{_named(model, llm)} is deprecated; it retires at {getattr(info, 'retires_at', 'a time to come')}.")


async def _check_list(client: AsyncAnthropic, model: str, llm: LlmConfig) -> None:
    """Servers such as vLLM list their models, but describe none."""
    try:
        names = [str(info.id) async for info in client.models.list()]
    except APIError as error:
        if isinstance(error, APIStatusError) and error.status_code in NO_ENDPOINT:
            print(f"{where(llm)} does not tell its models: whether it has {model} is seen at the first request.")
            return
        raise unreachable(error, model, llm) from error
    if model not in names:
        raise BadInput(f"{_named(model, llm)} is not served by {where(llm)}. It has: {', '.join(names) or 'none'}.")


async def check_batches(client: AsyncAnthropic, llm: LlmConfig) -> None:
    """BadInput if the server takes no batches, as local servers do not."""
    try:
        await patiently(lambda: client.messages.batches.list(limit=1))
    except APIError as error:
        if isinstance(error, APIStatusError) and error.status_code in NO_ENDPOINT:
            raise BadInput(f"analysis.llm.mode=batch: {where(llm)} has no message batches. Set it to sync.") from error
        raise unreachable(error, llm.model, llm) from error


def _named(model: str, llm: LlmConfig) -> str:
    settings = {llm.second_model: "llm.second_model", llm.model: "llm.model"}
    return f"analysis.{settings.get(model, 'scoring.judge')} ({model})"


async def _others(client: AsyncAnthropic) -> str:
    try:
        infos = [info async for info in client.models.list(limit=100)]
    except APIError:
        return "Choose a current one."
    names = [info.id for info in infos if getattr(info, "lifecycle", "active") == "active"]
    return f"Choose one of: {', '.join(names[:12])}."
