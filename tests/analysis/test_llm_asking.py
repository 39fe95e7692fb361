"""Whatever the server does, every question ends with one outcome, and no answer that came is paid for again."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from analysis.llm import client
from analysis.llm.asking import ask
from analysis.llm.budget import BudgetSpent
from analysis.llm.ledger import Ledger
from extract.errors import BadInput
from tests.analysis.asked import MODEL, anything, config, fates, question, rows
from tests.analysis.messages_rules import content_of
from tests.analysis.messages_stub import MessagesStub

TROUBLE = {
    "thing 1": ["status 429 retry-after 0.2"],
    "thing 2": ["status 500", "status 529"],
    "thing 3": ["reset"],
    "thing 4": ["status 408", "status 409"],
    "thing 5": ["timeout"],
    "thing 6": ["refusal"],
    "thing 7": ["truncated"],
    "thing 8": ["truncated", "truncated"],
    "thing 9": ["malformed", "not json"],
    "thing 10": ["unknown", "malformed"],
    "thing 11": ["thinking"],
    "thing 12": ["status 503"] * 3,
    "thing 13": ["status 413"],
    "thing 14": ["malformed", "status 500"],
}
OUTCOMES = {6: "refused", 8: "truncated", 9: "invalid", 10: "invalid", 12: "failed", 13: "failed"}


@pytest.fixture(autouse=True)
def key_and_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-the-test")
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.sqlite"


def test_every_question_ends_with_exactly_one_outcome(path: Path) -> None:
    with MessagesStub(fates(TROUBLE)) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(20)], anything, config(stub), ledger)
    assert [answer.outcome for answer in answers] == [OUTCOMES.get(n, "answered") for n in range(20)]
    assert [answer.value is not None for answer in answers] == [n not in OUTCOMES for n in range(20)]
    assert all(answer.reason for answer in answers if answer.outcome != "answered")
    assert rows(path, "SELECT count(*), count(outcome) FROM questions") == [(20, 20)]
    # One answer each, but those whose first one was of no use.
    again = {f"thing {n}" for n in (7, 8, 9, 10, 14)}
    paid = {body["messages"][0]["content"]: stub.paid[content_of(body)] for body in stub.bodies}
    refused = {"thing 12", "thing 13"}
    assert paid == {f"thing {n}": 2 if f"thing {n}" in again else 1 for n in range(20)} | dict.fromkeys(refused, 0)


def test_a_rerun_asks_only_what_failed(path: Path) -> None:
    asked = [question(n) for n in range(20)]
    with MessagesStub(fates(TROUBLE)) as stub:
        with Ledger(path) as ledger:
            first = ask(asked, anything, config(stub), ledger)
        paid, calls = stub.paid.copy(), len(stub.bodies)
        with Ledger(path) as ledger:
            second = ask(asked, anything, config(stub), ledger)
    new = [body["messages"][0]["content"] for body in stub.bodies[calls:]]
    # The fourth request for thing 12 and the second for thing 13 are answered.
    assert sorted(new) == ["thing 12", "thing 13"] and sum((stub.paid - paid).values()) == 2
    changed = [n for n in range(20) if first[n] != second[n]]
    assert changed == [12, 13] and {second[n].outcome for n in changed} == {"answered"}


def test_a_finished_study_needs_neither_key_nor_server(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MessagesStub() as stub, Ledger(path) as ledger:
        llm = config(stub)
        first = ask([question(1)], anything, llm, ledger)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with Ledger(path) as ledger:
        assert ask([question(1)], anything, llm, ledger) == first


@pytest.mark.parametrize("says", ["seconds", "date"])
def test_retry_after_is_honoured_by_all_requests(path: Path, says: str) -> None:
    after = "0.8"
    if says == "date":
        after = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True).replace(" ", "_")
    plan = fates({"thing 0": [f"status 429 retry-after {after}"]})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(6)], anything, config(stub, concurrency=2), ledger)
    times = stub.times[content_of(stub.bodies[0])]
    others = [when for body in stub.bodies[1:] for when in stub.times[content_of(body)]]
    assert times[1] - times[0] >= (0.8 if says == "seconds" else 0.5)
    assert min(when for when in others if when > times[0]) - times[0] >= (0.8 if says == "seconds" else 0.5)
    assert {answer.outcome for answer in answers} == {"answered"}


def test_requests_under_way_are_bounded_and_the_first_of_a_prefix_goes_alone(path: Path) -> None:
    with MessagesStub(latency=0.05) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(12)], anything, config(stub, concurrency=4), ledger)
    assert stub.most_busy == 4
    assert [answer.usage["cache_write_tokens"] > 0 for answer in answers] == [True] + [False] * 11
    assert all(answer.usage["cache_read_tokens"] > 0 for answer in answers[1:])


def test_each_attempt_is_in_the_ledger_with_its_raw_response(path: Path) -> None:
    plan = fates({"thing 1": ["status 500", "malformed"]})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        (answer,) = ask([question(1)], anything, config(stub), ledger)
    found = rows(path, "SELECT status, error, message, response, usd FROM attempts ORDER BY number")
    assert [row[0] for row in found] == ["error", "response", "response"]
    assert found[0][1] == "500 as planned"
    assert '"stop_reason": "end_turn"' in found[2][3] and found[2][2] == "msg_000002"
    assert answer.usd == pytest.approx(found[1][4] + found[2][4]) and answer.usd > 0
    # The prefix is stored once for all questions, the schema too.
    assert rows(path, "SELECT count(*) FROM texts") == [(2,)]


def test_costs_are_counted_by_kind_and_model(path: Path) -> None:
    asked = [question(n) for n in range(15)] + [question(n, kind="describe") for n in range(3)]
    with MessagesStub(fates(TROUBLE)) as stub, Ledger(path) as ledger:
        answers = ask(asked, anything, config(stub), ledger)
    with path.with_name("costs.csv").open(newline="") as file:
        found = {(row["kind"], row["model"]): row for row in csv.DictReader(file)}
    row = found["categorise", MODEL]
    outcomes = ("answered", "refused", "truncated", "invalid", "failed")
    assert {name: int(row[name]) for name in outcomes} == {
        "answered": 9,
        "refused": 1,
        "truncated": 1,
        "invalid": 2,
        "failed": 2,
    }
    assert sum(float(row["usd"]) for row in found.values()) == pytest.approx(
        sum(answer.usd for answer in answers), abs=1e-5
    )
    assert int(found["describe", MODEL]["answered"]) == 3


def test_refusals_are_counted_per_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [question(n, model=model) for model in (MODEL, "claude-haiku-5-5") for n in (1, 2)]
    with MessagesStub(fates({"thing 1": ["refusal"]})) as stub, Ledger(path) as ledger:
        answers = ask(asked, anything, config(stub), ledger)
    assert Counter((answer.model, answer.outcome) for answer in answers) == Counter(
        {(model, outcome): 1 for model in (MODEL, "claude-haiku-5-5") for outcome in ("answered", "refused")}
    )
    assert f"1 refused ({MODEL}), 1 refused (claude-haiku-5-5)" in capsys.readouterr().out


def test_the_budget_stops_cleanly_and_keeps_what_was_answered(path: Path) -> None:
    asked = [question(n, max_tokens=4000) for n in range(30)]
    # 800 tokens of answer are expected ($0.008); 4000 come ($0.04).
    with MessagesStub(answer=lambda body: {"category": "tool", "reason": "r" * 15_950}) as stub:
        with Ledger(path) as ledger:
            with pytest.raises(BudgetSpent, match=r"max_usd \(\$0\.5000\)") as caught:
                ask(asked, anything, config(stub, max_usd=0.5, concurrency=4), ledger)
            spent = ledger.spent()
        answered = len(stub.bodies)
        assert spent <= 0.5 and answered == int(0.5 / 0.041) == 12
        assert "12 of 30 questions" in str(caught.value)
        with Ledger(path) as ledger:
            answers = ask(asked, anything, config(stub, max_usd=2.0), ledger)
    assert {answer.outcome for answer in answers} == {"answered"}
    assert set(stub.paid.values()) == {1} and len(stub.paid) == 30


def test_a_budget_that_cannot_suffice_is_refused_before_anything_is_paid(path: Path) -> None:
    with MessagesStub() as stub, Ledger(path) as ledger:
        with pytest.raises(
            BadInput, match=r"categorise: 30 questions .* more than analysis\.llm\.max_usd \(\$0\.0100\)"
        ):
            ask([question(n) for n in range(30)], anything, config(stub, max_usd=0.01), ledger)
        assert not stub.paid and stub.calls["POST /v1/messages/count_tokens"] > 0


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


def test_two_processes_do_not_ask_for_one_study(path: Path) -> None:
    with Ledger(path), pytest.raises(BadInput, match="in use by another process"), Ledger(path):
        pass
    with Ledger(path):
        pass


def test_an_interrupt_keeps_what_is_under_way(path: Path) -> None:
    with MessagesStub(latency=0.3) as stub:
        timer = threading.Timer(0.75, lambda: os.kill(os.getpid(), signal.SIGINT))
        with Ledger(path) as ledger, pytest.raises(KeyboardInterrupt):
            timer.start()
            ask([question(n) for n in range(40)], anything, config(stub, concurrency=4), ledger)
        time.sleep(0.1)
        asked = len(stub.bodies)
        assert 0 < asked < 40
        # What was paid for was waited for.
        assert rows(path, "SELECT count(*) FROM questions WHERE outcome = 'answered'") == [(asked,)]
        assert rows(path, "SELECT count(*) FROM attempts WHERE status = 'sent'") == [(0,)]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with Ledger(path) as ledger:
            ask([question(n) for n in range(40)], anything, config(stub, concurrency=32), ledger)
    assert set(stub.paid.values()) == {1} and len(stub.paid) == 40


def test_a_response_is_durable_while_others_are_waited_for(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()

    def look() -> None:  # what a process that is killed now leaves behind
        for file in path.parent.glob("requests.sqlite*"):
            shutil.copy(file, copy)

    with MessagesStub(fates({"thing 2": ["timeout"]})) as stub, Ledger(path) as ledger:
        timer = threading.Timer(1.5, look)
        timer.start()
        ask([question(n) for n in range(3)], anything, config(stub, timeout_s=2.5, concurrency=2), ledger)
    timer.join()
    found = rows(copy / path.name, "SELECT prompt, outcome, status FROM questions JOIN attempts ON question = id")
    assert sorted(found) == [
        ("thing 0", "answered", "response"),
        ("thing 1", "answered", "response"),
        ("thing 2", None, "sent"),
    ]


def test_more_attempts_are_made_where_they_are_allowed_later(path: Path) -> None:
    plan = fates({"thing 1": ["truncated", "malformed"]})
    with MessagesStub(plan) as stub:
        for attempts, outcome, requests in (
            (1, "truncated", 1),
            (1, "truncated", 1),
            (2, "invalid", 2),
            (3, "answered", 3),
        ):
            with Ledger(path) as ledger:
                (answer,) = ask([question(1)], anything, config(stub, max_attempts_per_answer=attempts), ledger)
            assert (answer.outcome, len(stub.bodies)) == (outcome, requests)
