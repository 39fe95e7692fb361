"""Requests hold what current models take, and responses are what they say: answers, refusals, or of no use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from analysis.llm.config import LlmConfig
from analysis.llm.messages import judge, problem_of, request_of, usage_of
from analysis.llm.prices import Price, price_of
from analysis.llm.prompting import object_schema
from analysis.llm.questions import Question
from extract.errors import BadInput
from tests.analysis.asked import anything, question

GOOD = {"category": "fruit", "reason": "it grows on trees"}


def response(*blocks: dict[str, Any], stop: str = "end_turn", **more: Any) -> str:
    return json.dumps({"id": "msg_1", "content": list(blocks), "stop_reason": stop, **more})


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value if isinstance(value, str) else json.dumps(value)}


THINKING = {"type": "thinking", "thinking": '{"category": "tool", "reason": "no"}', "signature": ""}


@pytest.mark.parametrize(
    "raw",
    [
        response(text(GOOD)),
        response(THINKING, text(GOOD)),
        response({"type": "redacted_thinking", "data": "x"}, text(json.dumps(GOOD)[:20]), text(json.dumps(GOOD)[20:])),
        response(text(f"```json\n{json.dumps(GOOD)}\n```")),
        response(text(GOOD), stop="stop_sequence"),
    ],
)
def test_an_answer_is_the_text_whatever_stands_before_it(raw: str) -> None:
    assert judge(question(1), raw, anything) == ("answered", GOOD, "")


@pytest.mark.parametrize(
    ("raw", "outcome", "reason"),
    [
        (response(stop="refusal", stop_details={"category": "bio", "explanation": None}), "refused", "bio"),
        (response(text(GOOD), stop="refusal", stop_details=None), "refused", "no explanation"),
        (response(text(GOOD), stop="max_tokens"), "truncated", "max_tokens"),
        (response(text("{"), stop="model_context_window_exceeded"), "truncated", "model_context_window_exceeded"),
        (response(text(GOOD), stop="tool_use"), "invalid", "stopped by tool_use"),
        (response(text("fruit")), "invalid", "not a JSON object: 'fruit'"),
        (response(text('["fruit"]')), "invalid", "not a JSON object"),
        (response(), "invalid", "not a JSON object: ''"),
        (response(text('{"category": "fruit", "reason": NaN}')), "invalid", "not a JSON object"),
        (
            response(text(GOOD | {"category": "vegetable"})),
            "invalid",
            r"\$\.category: 'vegetable' is not one of \['fruit', 'tool'\]",
        ),
        (response(text({"category": "fruit"})), "invalid", "'reason' is a required property"),
        (response(text(GOOD | {"score": 1})), "invalid", "'score' was unexpected"),
        (response(text(GOOD | {"reason": None})), "invalid", "None is not of type 'string'"),
        (response(text(GOOD | {"reason": "\ud800"})), "invalid", "half a character"),
        ("<html>502</html>", "invalid", "not a message"),
        ('{"error": {}}', "invalid", "not a message"),
    ],
)
def test_what_is_no_answer_has_an_outcome_and_a_reason(raw: str, outcome: str, reason: str) -> None:
    found = judge(question(1), raw, anything)
    assert found[:2] == (outcome, None)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found[2])


def test_own_validation_has_the_last_word() -> None:
    def too_short(question: Question, value: dict[str, Any]) -> str | None:
        return "the reason is too short" if len(value["reason"]) < 50 else None

    assert judge(question(1), response(text(GOOD)), too_short) == ("invalid", None, "the reason is too short")


def test_schemas_of_lists_and_numbers_are_checked_to_the_bottom() -> None:
    items = {"type": "array", "items": object_schema({"n": {"type": "integer"}, "on": {"type": "boolean"}})}
    schema = object_schema({"items": items})
    assert problem_of({"items": []}, schema) is None
    assert problem_of({"items": [{"n": 1, "on": True}]}, schema) is None
    for value, problem in (
        ([{"n": 1, "on": True}, {"n": True, "on": True}], "$.items[1].n: True is not of type 'integer'"),
        ([{"n": 1, "on": 0}], "$.items[0].on: 0 is not of type 'boolean'"),
        ([3], "$.items[0]: 3 is not of type 'object'"),
    ):
        assert problem_of({"items": value}, schema) == problem
    assert problem_of({"items": [], "x": 1}, schema | {"minProperties": 3}) is not None  # any keyword of JSON schema


def test_requests_neither_sample_nor_force_and_cache_the_prefix() -> None:
    request = request_of(question(1, effort="low"), LlmConfig())
    assert set(request) == {"model", "max_tokens", "system", "messages", "output_config"}
    assert request["system"][0]["cache_control"] == {"type": "ephemeral"}
    assert [message["role"] for message in request["messages"]] == ["user"]
    assert request["output_config"]["format"]["type"] == "json_schema"
    assert request["output_config"]["effort"] == "low"
    assert "output_config" not in request_of(question(1), LlmConfig(send_schema=False))


def test_repeats_are_questions_of_their_own_with_the_same_request() -> None:
    first, second = question(1), question(1, repeat=1)
    assert first.id != second.id and request_of(first, LlmConfig()) == request_of(second, LlmConfig())
    assert len({first.id, question(2).id, question(1, system="x").id, question(1, model="y").id}) == 4
    assert first.id == question(1).id == question(1, max_tokens=999).id


def test_costs_by_hand() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 200, "cache_write_tokens": 4000, "cache_read_tokens": 10_000}
    price = Price(2.0, 10.0, 2.5, 0.1)
    # 0.002 + 0.002 + 0.01 + 0.001
    assert price.of(usage) == pytest.approx(0.015)
    halved = price_of("m", LlmConfig(prices={"m": [2.0, 10.0, 2.5, 0.1]}), batch=True)
    assert halved.of(usage) == pytest.approx(0.0075)
    assert price.worst(1000, 200) == pytest.approx(0.0045) == price.expected(1000, 200) + 0.0005


def test_a_response_without_usage_used_nothing() -> None:
    used = {"input_tokens": 7, "cache_read_input_tokens": None, "output_tokens": 3}
    assert usage_of(response(usage=used))[1] == {
        "input_tokens": 7,
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "output_tokens": 3,
    }
    assert usage_of("nothing") == ("", dict.fromkeys(usage_of(response())[1], 0))


def test_prices_come_from_the_settings_then_from_the_table() -> None:
    assert price_of("claude-sonnet-5-5", LlmConfig()) == Price(2.0, 10.0, 2.5, 0.1)
    assert price_of("claude-sonnet-5-5", LlmConfig(prices={"claude-sonnet-5-5": [1, 2, 3, 4]})) == Price(1, 2, 3, 4)
    assert price_of("qwen", LlmConfig(base_url="http://localhost")) == Price(0, 0, 0, 0)
    with pytest.raises(BadInput, match=r"'\+analysis\.llm\.prices=\{claude-new:\["):
        price_of("claude-new", LlmConfig())
