"""What servers refuse, for now or for good, and how long they are waited for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from anthropic import APIConnectionError, APITimeoutError

from analysis.llm import client
from analysis.llm.asking import ask
from analysis.llm.client import may_be_charged
from analysis.llm.ledger import Ledger
from extract.errors import BadInput
from tests.analysis.asked import anything, config, fates, question
from tests.analysis.messages_rules import content_of
from tests.analysis.messages_stub import Handler, MessagesStub


@pytest.mark.parametrize(("status", "match"), [(401, "ANTHROPIC_API_KEY"), (402, "credit"), (403, "may not use")])
def test_what_all_requests_would_meet_stops_the_run(path: Path, status: int, match: str) -> None:
    plan = fates({"thing 3": [f"status {status}"]})
    with MessagesStub(plan, latency=0.02) as stub, Ledger(path) as ledger:
        with pytest.raises(BadInput, match=match):
            ask([question(n) for n in range(20)], anything, config(stub, concurrency=2), ledger)
        assert len(stub.bodies) < 10
        answers = ask([question(n) for n in range(40)], anything, config(stub, concurrency=8), ledger)
    assert {answer.outcome for answer in answers} == {"answered"} and set(stub.paid.values()) == {1}


def test_a_server_that_refuses_every_request_is_not_asked_to_the_end(path: Path) -> None:
    with MessagesStub(lambda prompt, nth: "status 400") as stub, Ledger(path) as ledger:
        with pytest.raises(BadInput, match=r"refuses every request: 400 as planned.*send_schema=false"):
            ask([question(n) for n in range(40)], anything, config(stub), ledger)
        assert len(stub.bodies) < 20


def test_a_kind_that_is_refused_everywhere_stops_the_run_whatever_others_were_answered(path: Path) -> None:
    def plan(prompt: str, nth: int) -> str:
        return "status 400" if prompt == "refused" else "answer"

    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        ask([question(n, kind="describe") for n in range(3)], anything, config(stub), ledger)
        with pytest.raises(BadInput, match="refuses every request"):
            ask([question(n, prompt="refused") for n in range(9)], anything, config(stub), ledger)


@pytest.mark.parametrize(
    ("cause", "kind", "charged"),
    [
        (httpx.ConnectError("x"), APIConnectionError, False),
        (httpx.ConnectTimeout("x"), APITimeoutError, False),
        (httpx.ReadError("x"), APIConnectionError, True),
        (httpx.ReadTimeout("x"), APITimeoutError, True),
    ],
)
def test_only_what_was_sent_may_be_charged(cause: Exception, kind: type, charged: bool) -> None:
    error = kind(request=httpx.Request("POST", "http://localhost"))
    error.__cause__ = cause
    assert may_be_charged(error) == charged


def test_questions_that_the_server_will_never_take_do_not_block_a_study(path: Path) -> None:
    """Whatever the order: those that are rejected before the model has answered anything are asked once more."""

    def plan(prompt: str, nth: int) -> str:
        return "status 400" if prompt in ("thing 0", "thing 2", "thing 3", "thing 4") else "answer"

    asked = [question(n) for n in range(5)]
    outcomes = ["answered", *["refused"] * 3]
    with MessagesStub(plan) as stub:
        for first, requests in (("failed", 5), ("refused", 6), ("refused", 6)):
            with Ledger(path) as ledger:
                answers = ask(asked, anything, config(stub, concurrency=1), ledger)
            assert [answer.outcome for answer in answers] == [first, *outcomes] and len(stub.bodies) == requests
    assert all("400 as planned" in answer.reason for answer in answers if answer.outcome == "refused")


def test_an_account_without_money_refuses_no_question_for_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Handler._error

    def without_money(handler: Handler, status: int, message: str, headers: dict | None = None) -> None:
        send(handler, status, "Your credit balance is too low" if status == 400 else message, headers)

    monkeypatch.setattr(Handler, "_error", without_money)
    with MessagesStub(fates({"thing 2": ["status 400"]})) as stub, Ledger(path) as ledger:
        with pytest.raises(BadInput, match="account's credit"):
            ask([question(n) for n in range(4)], anything, config(stub, concurrency=1), ledger)
        answers = ask([question(n) for n in range(4)], anything, config(stub), ledger)
    assert {answer.outcome for answer in answers} == {"answered"}


@pytest.mark.parametrize(("status", "told", "requests"), [(500, "false", 1), (400, "true", 2)])
def test_the_server_may_say_whether_to_send_again(path: Path, status: int, told: str, requests: int) -> None:
    plan = fates({"thing 1": [f"status {status} x-should-retry {told}"]})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        (answer,) = ask([question(1)], anything, config(stub), ledger)
    assert (len(stub.bodies), answer.outcome) == (requests, "answered" if requests == 2 else "failed")


@pytest.mark.parametrize("says", ["seconds", "date"])
def test_retry_after_is_honoured_by_all_requests(path: Path, says: str) -> None:
    def plan(prompt: str, nth: int) -> str:
        if prompt != "thing 0" or nth:
            return "answer"
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # in whole seconds
        return f"status 429 retry-after {'0.8' if says == 'seconds' else date.replace(' ', '_')}"

    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(6)], anything, config(stub, concurrency=2), ledger)
    times = stub.times[content_of(stub.bodies[0])]
    others = [when for body in stub.bodies[1:] for when in stub.times[content_of(body)]]
    assert times[1] - times[0] >= (0.8 if says == "seconds" else 0.5)
    assert min(when for when in others if when > times[0]) - times[0] >= (0.8 if says == "seconds" else 0.5)
    assert {answer.outcome for answer in answers} == {"answered"}


@pytest.mark.parametrize("mode", ["sync", "batch"])
def test_a_server_that_asks_to_wait_for_a_day_is_not_waited_for(
    path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    day = ["status 429 retry-after 86400"]
    plan = fates({"thing 3": day} if mode == "sync" else {"create batch": day})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        asked = [question(n) for n in range(9)]
        answers = ask(asked, anything, config(stub, mode=mode, concurrency=1), ledger)
        last = answers[-1]
        assert answers[0].outcome == ("answered" if mode == "sync" else "failed")
        assert last.outcome == "failed" and last.reason.startswith("not asked: the server asks to wait 1,440 min (429")
        assert "count as failed" in capsys.readouterr().out
        assert {each.outcome for each in ask(asked, anything, config(stub), ledger)} == {"answered"}


def test_a_wait_of_minutes_is_said(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SAID_S", 0.2)
    plan = fates({"thing 0": ["status 429 retry-after 0.1"], "thing 1": ["status 429 retry-after 0.3"]})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        ask([question(n) for n in range(3)], anything, config(stub, concurrency=1), ledger)
    assert capsys.readouterr().out.count("the server asks to wait 0 min (429 as planned): waiting") == 1
