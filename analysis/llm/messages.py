"""A question as a request of the Messages API, and what a response says."""

from __future__ import annotations

import json
import re
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from analysis.llm.config import LlmConfig
from analysis.llm.questions import Question, Validate

# Where a response ended because it could not grow, not because it was complete.
CUT_OFF = ("max_tokens", "model_context_window_exceeded")
COMPLETE = ("end_turn", "stop_sequence")
# Local servers that know no schemas often put JSON into a Markdown fence.
MARKDOWN_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n```", re.DOTALL)


def request_of(question: Question, llm: LlmConfig) -> dict[str, Any]:
    """The body of the request. The system prompt ends the prefix that is cached; nothing forces or samples."""
    output: dict[str, Any] = {"effort": question.effort} if question.effort else {}
    if llm.send_schema:
        output["format"] = {"type": "json_schema", "schema": question.schema}
    return {
        "model": question.model,
        "max_tokens": question.max_tokens,
        "system": [{"type": "text", "text": question.system, "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": question.prompt}],
        **({"output_config": output} if output else {}),
    }


def usage_of(text: str) -> tuple[str, dict[str, int]]:
    """The id of a response and the tokens that it used; nothing where it does not say."""
    message = _object(text) or {}
    used = message.get("usage") or {}
    return str(message.get("id") or ""), {
        "input_tokens": used.get("input_tokens") or 0,
        "cache_read_tokens": used.get("cache_read_input_tokens") or 0,
        "cache_write_tokens": used.get("cache_creation_input_tokens") or 0,
        "output_tokens": used.get("output_tokens") or 0,
    }


def judge(question: Question, text: str, validate: Validate) -> tuple[str, dict[str, Any] | None, str]:
    """(outcome, value, reason) of a raw response: answered only if it is complete, follows the schema and validates."""
    message = _object(text)
    if message is None or not isinstance(message.get("content"), list):
        return "invalid", None, "the response is not a message"
    stop = message.get("stop_reason")
    if stop == "refusal":
        details = message.get("stop_details") or {}
        return "refused", None, str(details.get("explanation") or details.get("category") or "no explanation")
    if stop in CUT_OFF:
        return "truncated", None, f"cut off: {stop}"
    if stop not in COMPLETE:
        return "invalid", None, f"stopped by {stop}"
    blocks = [block for block in message["content"] if isinstance(block, dict) and block.get("type") == "text"]
    written = "".join(str(block.get("text")) for block in blocks).strip()
    fenced = MARKDOWN_FENCE.fullmatch(written)
    value = _object(fenced[1] if fenced else written)
    if value is None:
        return "invalid", None, f"not a JSON object: {written[:80]!r}"
    problem = problem_of(value, question.schema) or validate(question, value)
    return ("invalid", None, problem) if problem else ("answered", value, "")


def is_cut_off(text: str) -> bool:
    """Whether a raw response ended because it could not grow."""
    return (_object(text) or {}).get("stop_reason") in CUT_OFF


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def problem_of(value: Any, schema: dict[str, Any]) -> str | None:
    """Where a value departs from a JSON schema, or holds half a character, which no file can hold."""
    error = best_match(Draft202012Validator(schema).iter_errors(value))
    if error:
        return f"{error.json_path}: {error.message[:200]}"
    halves = any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False))
    return "the answer holds half a character" if halves else None
