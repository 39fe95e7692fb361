"""A question as a request of the Messages API, and what a response says."""

from __future__ import annotations

import json
import re
from typing import Any

from analysis.llm.config import LlmConfig
from analysis.llm.questions import Question, Validate

# Where a response ended because it could not grow, not because it was complete.
CUT_OFF = ("max_tokens", "model_context_window_exceeded")
COMPLETE = ("end_turn", "stop_sequence")
# Local servers that know no schemas often put JSON into a Markdown fence.
MARKDOWN_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n```", re.DOTALL)
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


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


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def problem_of(value: Any, schema: dict[str, Any], name: str = "the answer") -> str | None:
    """Where a value departs from a JSON schema: types, required and unknown properties, items, enum."""
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return f"{name} is not of type {kind}"
    if kind == "string" and any("\ud800" <= character <= "\udfff" for character in value):
        return f"{name} holds half a character"
    if "enum" in schema and value not in schema["enum"]:
        return f"{name} ({str(value)[:80]!r}) is none of the {len(schema['enum'])} choices"
    if kind == "array":
        problems = (problem_of(item, schema.get("items", {}), f"{name}[{i}]") for i, item in enumerate(value))
        return next((problem for problem in problems if problem), None)
    return _problem_of_object(value, schema, name) if kind == "object" else None


def _problem_of_object(value: dict[str, Any], schema: dict[str, Any], name: str) -> str | None:
    properties = schema.get("properties", {})
    missing = [key for key in schema.get("required", ()) if key not in value]
    unknown = [key for key in value if key not in properties and schema.get("additionalProperties") is False]
    if missing or unknown:
        return f"{name} lacks {missing[0]!r}" if missing else f"{name} has the unknown property {unknown[0][:80]!r}"
    problems = (problem_of(value[key], part, key) for key, part in properties.items() if key in value)
    return next((problem for problem in problems if problem), None)
