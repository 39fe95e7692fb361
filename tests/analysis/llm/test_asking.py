"""Whatever the server does, every question ends with one outcome, and no answer that came is paid for again."""

from __future__ import annotations

import csv
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from analysis.llm.asking import ask
from analysis.llm.ledger import Ledger
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
OUTCOMES = {6: "refused", 8: "truncated", 9: "invalid", 10: "invalid", 12: "failed", 13: "refused"}


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
    with sqlite3.connect(path) as database:  # as after a kill between a response and what it leads to
        database.execute("UPDATE questions SET outcome = NULL")
    with Ledger(path) as ledger:
        assert ask([question(1)], anything, llm, ledger) == first


def test_requests_under_way_are_bounded_and_the_first_of_a_prefix_goes_alone(path: Path) -> None:
    with MessagesStub(latency=0.05) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(12)], anything, config(stub, concurrency=4), ledger)
    starts = sorted(when for times in stub.times.values() for when in times)
    assert stub.most_busy == 4 and starts[1] - starts[0] >= 0.05
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


def test_refusals_are_counted_per_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [question(n, model=model) for model in (MODEL, "claude-haiku-5-5") for n in (1, 2)]
    with MessagesStub(fates({"thing 1": ["refusal"]})) as stub, Ledger(path) as ledger:
        answers = ask(asked, anything, config(stub), ledger)
    assert Counter((answer.model, answer.outcome) for answer in answers) == Counter(
        {(model, outcome): 1 for model in (MODEL, "claude-haiku-5-5") for outcome in ("answered", "refused")}
    )
    assert f"1 refused ({MODEL}), 1 refused (claude-haiku-5-5)" in capsys.readouterr().out


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
