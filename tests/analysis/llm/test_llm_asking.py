"""Whatever the server does, every question ends with one outcome, and no answer that came is paid for again."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sqlite3
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
from tests.analysis.messages_stub import Handler, MessagesStub

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
OUTCOMES = {6: "refused", 8: "truncated", 9: "invalid", 10: "invalid", 12: "failed", 13: "refused"}


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
    # The fourth request for thing 12 is answered.
    assert sorted(new) == ["thing 12"] and sum((stub.paid - paid).values()) == 1
    changed = [n for n in range(20) if first[n] != second[n]]
    assert changed == [12] and second[12].outcome == "answered"


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
        "refused": 2,
        "truncated": 1,
        "invalid": 2,
        "failed": 1,
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


def test_raising_the_limit_of_answers_pays_only_for_those_that_were_cut_off(path: Path) -> None:
    cut_off = iter(["truncated"] * 3)  # of which the last is an attempt within the new limit

    def plan(prompt: str, nth: int) -> str:
        return next(cut_off, "answer") if prompt == "thing 1" else "answer"

    with MessagesStub(plan) as stub:
        for limit, outcome, requests in ((300, "truncated", 5), (300, "truncated", 5), (600, "answered", 7)):
            with Ledger(path) as ledger:
                asked = [question(n, max_tokens=limit) for n in range(4)]
                answers = ask(asked, anything, config(stub), ledger)
            assert (answers[1].outcome, len(stub.bodies)) == (outcome, requests)
    assert stub.bodies[-1]["max_tokens"] == 600 and {each.outcome for each in answers} == {"answered"}


def test_what_may_have_been_charged_for_nothing_counts_as_spent(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesStub(latency=0.6) as stub, Ledger(path) as ledger:
        # One answer costs at most about $0.004; each is charged by the server, and none is seen.
        llm = config(stub, timeout_s=0.3, max_retries=20, max_usd=0.02, concurrency=1)
        with pytest.raises(BudgetSpent, match=r"max_usd \(\$0\.0200\)"):
            ask([question(1)], anything, llm, ledger)
        assert len(stub.bodies) in range(3, 7) and 0.01 < ledger.spent() == ledger.unknown() <= 0.02
        with pytest.raises(BadInput):
            ask([question(1)], anything, llm, ledger)
        (answer,) = ask([question(1)], anything, config(stub, timeout_s=5), ledger)
    assert answer.outcome == "answered" and answer.usd < 0.01
    assert "may have cost up to $0.0" in capsys.readouterr().out
    with path.with_name("costs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["usd_unknown"]) > 0.01 > float(row["usd"])


def test_what_was_never_sent_or_refused_costs_nothing(path: Path) -> None:
    plan = fates({"thing 1": ["status 500", "status 429 retry-after 0.01"], "thing 2": ["status 413"]})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        ask([question(n) for n in range(3)], anything, config(stub), ledger)
        assert ledger.unknown() == 0


def test_a_ledger_of_an_earlier_version_is_gone_on_with(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.add([question(1)])
    with sqlite3.connect(path) as database:
        for column in ("usd_unknown", "max_tokens"):
            database.execute(f"ALTER TABLE attempts DROP COLUMN {column}")
    with MessagesStub() as stub, Ledger(path) as ledger:
        assert ask([question(1)], anything, config(stub), ledger)[0].outcome == "answered"


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


def test_a_second_interrupt_does_not_wait_for_what_is_under_way(path: Path) -> None:
    with MessagesStub(latency=8) as stub, Ledger(path) as ledger:
        timers = [threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGINT)) for after in (1.0, 1.5)]
        for timer in timers:
            timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask([question(1)], anything, config(stub, timeout_s=30), ledger)
        assert 1.4 < time.monotonic() - started < 5
        # It may be charged for.
        assert ledger.unknown() > 0
    assert rows(path, "SELECT status FROM attempts") == [("sent",)]


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
