"""What requests cost, what they may have cost, and the limit that both keep to."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from analysis.llm.asking import ask
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from analysis.llm.prices import Price
from extract.errors import BadInput
from tests.analysis.asked import MODEL, SYSTEM, anything, config, estimated, fates, question
from tests.analysis.messages_stub import MessagesStub


def test_the_budget_stops_cleanly_and_keeps_what_was_answered(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [question(n, max_tokens=4000) for n in range(30)]
    # 800 tokens of answer are expected ($0.008); 4000 come ($0.04).
    with MessagesStub(answer=lambda body: {"category": "tool", "reason": "r" * 15_950}) as stub:
        llm = config(stub, max_usd=0.5, concurrency=4)
        with Ledger(path) as ledger:
            answers = ask(asked, anything, llm, ledger)
            assert ledger.spent() <= 0.5 and len(stub.bodies) == int(0.5 / 0.041) == 12
            assert Counter((each.outcome, each.reason) for each in answers) == {
                ("answered", ""): 12,
                ("failed", "not asked: analysis.llm.max_usd ($0.50) is reached"): 18,
            }
            # The steps that follow go on to their end, so that what is lost is shown.
            others = ask([question(n, kind="describe") for n in range(30)], anything, llm, ledger)
            assert {each.outcome for each in others} == {"failed"} and len(stub.bodies) == 12
        assert "18 of 30 questions were not asked and count as failed" in capsys.readouterr().out
        with Ledger(path) as ledger:
            answers = ask(asked, anything, config(stub, max_usd=2.0), ledger)
    assert {answer.outcome for answer in answers} == {"answered"}
    assert set(stub.paid.values()) == {1} and len(stub.paid) == 30


def test_a_budget_that_cannot_suffice_is_refused_before_anything_is_paid(path: Path) -> None:
    with MessagesStub() as stub, Ledger(path) as ledger:
        with pytest.raises(BadInput, match=r"categorise: 30 questions .* more than analysis\.llm\.max_usd \(\$0\.01,"):
            ask([question(n) for n in range(30)], anything, config(stub, max_usd=0.01), ledger)
        assert not stub.paid and stub.calls["POST /v1/messages/count_tokens"] > 0
    assert len(path.with_name("costs.csv").read_text().splitlines()) == 1  # nothing came of any, and no row says so


def test_what_may_have_been_charged_for_nothing_counts_as_spent(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesStub(latency=0.6) as stub, Ledger(path) as ledger:
        # One answer costs at most about $0.004; each is charged by the server, and none is seen.
        llm = config(stub, timeout_s=0.3, max_retries=20, max_usd=0.02, concurrency=3)
        (answer,) = ask([question(1)], anything, llm, ledger)
        assert answer.reason == "not asked: analysis.llm.max_usd ($0.02) is reached"
        assert len(stub.bodies) in range(3, 7) and 0.01 < ledger.spent() == ledger.unknown() <= 0.02
        requests = len(stub.bodies)
        assert ask([question(1)], anything, llm, ledger) == [answer] and len(stub.bodies) == requests
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


def test_timeouts_in_a_row_stop_the_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesStub(latency=0.5) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(9)], anything, config(stub, timeout_s=0.1, concurrency=2), ledger)
        assert {each.outcome for each in answers} == {"failed"} and len(stub.bodies) <= 6 and ledger.unknown() > 0
    reason = "not asked: 5 requests in a row had no answer within analysis.llm.timeout_s (0.1)"
    assert answers[-1].reason == reason and "Raise it, or see" in capsys.readouterr().out


@pytest.mark.parametrize(("concurrency", "slow"), [(1, [1]), (2, [6, 7, 8])])
def test_a_few_slow_questions_fail_and_the_others_are_answered(path: Path, concurrency: int, slow: list[int]) -> None:
    def plan(prompt: str, nth: int) -> str:
        return "timeout" if prompt in {f"thing {n}" for n in slow} else "answer"

    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        llm = config(stub, timeout_s=0.2, concurrency=concurrency, max_retries=4)
        answers = ask([question(n) for n in range(9)], anything, llm, ledger)
        assert [n for n, answer in enumerate(answers) if answer.outcome != "answered"] == slow
        assert {answers[n].outcome for n in slow} == {"failed"}
        # Alone, it was sent again as often as the settings say.
        assert concurrency > 1 or "the last of 5 attempts" in answers[1].reason
        again = ask([question(n) for n in range(9)], anything, config(stub, timeout_s=0.2, max_retries=0), ledger)
    assert [answer.outcome for answer in again] == [answer.outcome for answer in answers]


def test_timeouts_among_answers_do_not(path: Path) -> None:
    plan = fates({f"thing {n}": ["timeout"] for n in (2, 4, 6, 8)})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(9)], anything, config(stub, timeout_s=0.4, concurrency=1), ledger)
    assert {answer.outcome for answer in answers} == {"answered"}


def test_scripts_with_more_tokens_per_character_are_foreseen(path: Path) -> None:
    """The stub counts six times as many tokens for a character of Korean as for one of English."""
    asked = [question(n, prompt="an English text " * (10 + n)) for n in range(40)]
    asked[17] = question(17, prompt="한국어" * 50)

    with MessagesStub() as stub, Ledger(path) as ledger:
        llm = config(stub)
        worst = estimated(asked, llm, ledger).worst
    body = request_of(asked[17], llm)
    tokens = sum(len(json.dumps(body[name])) for name in ("messages", "system")) // 4
    assert worst[asked[17].id] >= Price(*llm.prices[MODEL]).worst(tokens, asked[17].max_tokens)


@pytest.mark.parametrize(("system", "cached"), [("short", False), (SYSTEM, True)])
def test_prefixes_too_short_for_the_cache_are_told(
    path: Path, capsys: pytest.CaptureFixture[str], system: str, cached: bool
) -> None:
    with MessagesStub() as stub, Ledger(path) as ledger:
        for _ in range(2):  # once, not by every rerun
            ask([question(n, system=system) for n in range(3)], anything, config(stub), ledger)
    assert capsys.readouterr().out.count("cached nothing: what the 3 requests share") == (0 if cached else 1)


def test_a_ledger_of_an_earlier_version_keeps_its_answers(path: Path) -> None:
    with MessagesStub() as stub:
        with Ledger(path) as ledger:
            paid = ask([question(0)], anything, config(stub), ledger)
        with sqlite3.connect(path) as database:
            database.execute("ALTER TABLE attempts DROP COLUMN usd_unknown")
            database.execute("ALTER TABLE attempts DROP COLUMN max_tokens")
        with Ledger(path) as ledger:
            answers = ask([question(0), question(1)], anything, config(stub), ledger)
            assert answers[0] == paid[0]
            assert ledger.spent() == pytest.approx(sum(answer.usd for answer in answers))
        assert sum(stub.paid.values()) == 2
