"""What the Messages API refuses, and the messages that it answers with: the rules of `messages_stub`."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from analysis.json_lines import json_text

SAMPLING = ("temperature", "top_p", "top_k")
# What structured outputs do not take.
UNSUPPORTED = ("minLength", "maxLength", "pattern", "minimum", "maximum", "minItems", "maxItems")
# Tokens of the shortest prefix that is cached.
LEAST_CACHED = 50
CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MODELS = {
    "claude-sonnet-5-5": "active",
    "claude-haiku-5-5": "active",
    "claude-next-6": "active",
    "claude-3-opus-20240229": "retired",
    "claude-sonnet-4-5": "deprecated",
}


class Refused(Exception):
    """A request that the API would refuse, with its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def content_of(body: dict[str, Any]) -> str:
    """What identifies the content of a request."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check(body: dict[str, Any], local: bool) -> None:
    """Refuses what current models refuse."""
    for name in SAMPLING:
        if name in body:
            raise Refused(400, f"{name} is not supported by this model")
    if (body.get("tool_choice") or {}).get("type") in ("any", "tool"):
        raise Refused(400, "tool_choice: forced tool use is not supported by this model")
    if body["messages"][-1]["role"] == "assistant":
        raise Refused(400, "prefilling assistant messages is not supported by this model")
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        raise Refused(400, "max_tokens: field required")
    if not local and MODELS.get(body["model"], "retired") == "retired":
        raise Refused(404, f"model: {body['model']}")
    form = (body.get("output_config") or {}).get("format")
    if form is not None:
        if form.get("type") != "json_schema":
            raise Refused(400, "output_config.format.type must be json_schema")
        check_schema(form["schema"])


def check_schema(schema: dict[str, Any]) -> None:
    """Refuses schemas that structured outputs do not take."""
    for name in UNSUPPORTED:
        if name in schema:
            raise Refused(400, f"output_config.format.schema: {name} is not supported")
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            raise Refused(400, "output_config.format.schema: additionalProperties must be false")
        for part in schema["properties"].values():
            check_schema(part)
    if schema.get("type") == "array":
        check_schema(schema["items"])


def by_schema(body: dict[str, Any]) -> Any:
    """A value that follows the schema of a request: the first choice, a few words, one item."""
    return fill(body["output_config"]["format"]["schema"])


def fill(schema: dict[str, Any]) -> Any:
    kind = schema.get("type")
    if "enum" in schema:
        return schema["enum"][0]
    if kind == "object":
        return {name: fill(part) for name, part in schema["properties"].items()}
    if kind == "array":
        return [fill(schema["items"])]
    return {"string": "made by schema", "boolean": True, "integer": 1, "number": 0.5}[str(kind)]


def message_of(body: dict[str, Any], fate: str, value: Any, number: int, cached: bool) -> dict[str, Any]:
    """A message with the answer `value`, or with what the fault `fate` makes of it."""
    text = value if isinstance(value, str) else json_text(value)
    if fate in ("truncated", "malformed"):
        text = text[: len(text) // 2]
    if fate == "not json":
        text = f"Here you are: {text}"
    if fate == "unknown":
        text = re.sub(r'("category": )"[^"]*"', r'\1"A Category of Its Own"', text)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text, "citations": None}]
    if fate == "thinking":
        blocks.insert(0, {"type": "thinking", "thinking": "{not the answer}", "signature": "c2ln"})
    stop = {"truncated": "max_tokens", "refusal": "refusal"}.get(fate, "end_turn")
    prefix = len(json.dumps(body.get("system", ""))) // 4
    prefix = prefix if prefix >= LEAST_CACHED else 0
    return {
        "id": f"msg_{number:06d}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [] if fate == "refusal" else blocks,
        "stop_reason": stop,
        "stop_details": {"type": "refusal", "category": "bio", "explanation": None} if fate == "refusal" else None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(body["messages"][-1]["content"]) // 4,
            "cache_creation_input_tokens": 0 if cached else prefix,
            "cache_read_input_tokens": prefix if cached else 0,
            "output_tokens": max(1, len(text) // 4),
        },
    }
