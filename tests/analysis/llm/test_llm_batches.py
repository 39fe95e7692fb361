"""Message batches: results in any order, entries that fail, and batches that are found again and never paid twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from analysis.llm import batches, client
from analysis.llm.asking import ask
from analysis.llm.budget import BudgetSpent
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from extract.errors import BadInput
from tests.analysis.asked import MODEL, anything, config, fates, question, rows
from tests.analysis.messages_rules import content_of
from tests.analysis.messages_stub import MessagesStub

TROUBLE = {
    "thing 1": ["expired"],
    "thing 2": ["errored"],
    "thing 3": ["canceled", "expired", "errored"],
    "thing 4": ["errored request"],
    "thing 5": ["missing"],
    "thing 6": ["refusal"],
    "thing 7": ["truncated"],
    "thing 8": ["malformed", "unknown"],
    "thing 9": ["thinking"],
}
OUTCOMES = {3: "failed", 4: "refused", 6: "refused", 8: "invalid"}


@pytest.fixture(autouse=True)
def key_and_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-the-test")
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.sqlite"


def test_every_question_of_a_batch_ends_with_exactly_one_outcome(path: Path) -> None:
    asked = [question(n) for n in range(12)]
    with MessagesStub(fates(TROUBLE), batch_s=0.1) as stub:
        llm = config(stub, mode="batch", prices={MODEL: [2.0, 10.0, 2.5, 0.1]})
        with Ledger(path) as ledger:
            answers = ask(asked, anything, llm, ledger)
        assert [answer.outcome for answer in answers] == [OUTCOMES.get(n, "answered") for n in range(12)]
        assert "batch" in answers[4].reason and "the last of 3 attempts" in answers[3].reason
        paid, made = stub.paid.copy(), len(stub.batches)
        with Ledger(path) as ledger:
            again = ask(asked, anything, llm, ledger)
    assert [n for n in range(12) if again[n] != answers[n]] == [3]
    assert sum((stub.paid - paid).values()) == 1 and len(stub.batches) == made + 1
    assert "POST /v1/messages" not in stub.calls


def test_results_go_to_their_questions_in_any_order(path: Path) -> None:
    def echo(body: dict) -> dict:
        return {"category": "fruit", "reason": body["messages"][0]["content"]}

    with MessagesStub(answer=echo) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(30)], anything, config(stub, mode="batch"), ledger)
        (batch,) = stub.batches.values()
    assert [answer.value["reason"] for answer in answers if answer.value] == [f"thing {n}" for n in range(30)]
    ids = [result["custom_id"] for result in batch["results"]]
    assert ids != [question(n).id for n in range(30)] and set(ids) == {question(n).id for n in range(30)}


def test_unusual_line_ends_and_halves_of_characters_cost_no_answer(path: Path) -> None:
    """The server sends U+2028, U+2029 and U+0085 as they are within a line; half a character makes one answer void."""
    ends = ["\u2028", "\u2029", "\u0085", "\ud83d"]

    def end_of(body: dict) -> dict:
        return {"category": "fruit", "reason": f"a{ends[int(body['messages'][0]['content'].split()[1])]}b"}

    with MessagesStub(answer=end_of) as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(4)], anything, config(stub, mode="batch"), ledger)
    assert [(answer.outcome, (answer.value or {}).get("reason")) for answer in answers] == [
        *(("answered", f"a{end}b") for end in ends[:3]),
        ("invalid", None),
    ]


def test_a_reason_with_half_a_character_is_entered(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.add([question(1)])
        ledger.fail(ledger.begin(question(1)), "half \ud83d")
        ledger.conclude(question(1), "refused", None, "half \ud83d")
    assert rows(path, "SELECT reason FROM questions UNION ALL SELECT error FROM attempts") == [(r"half \ud83d",)] * 2


def test_batches_cost_half(path: Path, tmp_path: Path) -> None:
    with MessagesStub() as stub, Ledger(path) as ledger:
        (cheap,) = ask([question(1)], anything, config(stub, mode="batch"), ledger)
    with MessagesStub() as stub, Ledger(tmp_path / "other.sqlite") as ledger:
        (dear,) = ask([question(1)], anything, config(stub), ledger)
    assert cheap.usage == dear.usage and cheap.usd == pytest.approx(dear.usd / 2)


def test_an_interrupted_wait_goes_on_with_the_same_batch(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [question(n) for n in range(5)]
    with MessagesStub(batch_s=1.5) as stub:
        llm = config(stub, mode="batch")
        timer = threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with Ledger(path) as ledger, pytest.raises(KeyboardInterrupt):
                timer.start()
                ask(asked, anything, llm, ledger)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert "goes on at the server" in capsys.readouterr().out
        # The mode may have changed meanwhile.
        with Ledger(path) as ledger:
            answers = ask(asked, anything, config(stub, mode="sync"), ledger)
    assert {answer.outcome for answer in answers} == {"answered"}
    assert len(stub.batches) == 1 and set(stub.paid.values()) == {1} and "POST /v1/messages" not in stub.calls


@pytest.mark.parametrize("retries", [0, 2])
def test_a_batch_whose_creation_was_not_confirmed_is_found_again(path: Path, retries: int) -> None:
    asked = [question(n) for n in range(5)]
    with MessagesStub(fates({"create batch": ["reset"]}), batch_s=0.2) as stub:
        others = [{"custom_id": f"x{n}", "params": request_of(question(100 + n), config(stub))} for n in range(5)]
        stub.start_batch(others)  # of somebody else, of the same size and time
        llm = config(stub, mode="batch", max_retries=retries)
        if not retries:
            with Ledger(path) as ledger, pytest.raises(BadInput, match="reads batches that were created"):
                ask(asked, anything, llm, ledger)
            assert rows(path, "SELECT id FROM batches") == [(None,)]
            stub.start_batch(others)
        with Ledger(path) as ledger:
            answers = ask(asked, anything, llm, ledger)
    assert {answer.outcome for answer in answers} == {"answered"}
    ours = {content_of(request["params"]) for request in stub.batches["msgbatch_0001"]["requests"]}
    assert len(stub.batches) == (2 if retries else 3) and {stub.paid[content] for content in ours} == {1}
    assert rows(path, "SELECT id FROM batches") == [("msgbatch_0001",)]


@pytest.mark.parametrize("status", [429, 529])
def test_a_batch_that_was_refused_for_now_is_not_looked_for(path: Path, status: int) -> None:
    """Batches of others, of the same size, are not waited for."""
    plan = fates({"create batch": [f"status {status} retry-after 0.01"]})
    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        llm, create = config(stub, mode="batch"), stub.start_batch

        def refuse_first(requests: list) -> dict:
            return create(requests) if stub.calls["POST /v1/messages/batches"] > 1 else {}

        create([{"custom_id": f"x{n}", "params": request_of(question(100 + n), llm)} for n in range(5)])
        stub.start_batch = refuse_first  # type: ignore[method-assign]
        next(iter(stub.batches.values()))["created"] += 3600  # ends in an hour
        answers = ask([question(n) for n in range(5)], anything, llm, ledger)
    assert {answer.outcome for answer in answers} == {"answered"} and len(stub.batches) == 2


def test_a_batch_of_another_size_is_not_waited_for(path: Path) -> None:
    asked = [question(n) for n in range(5)]
    with MessagesStub() as stub, Ledger(path) as ledger:
        llm = config(stub, mode="batch")
        stub.start_batch([{"custom_id": "x", "params": request_of(question(100), llm)}])
        next(iter(stub.batches.values()))["created"] += 3600
        ledger.add(asked)
        ledger.intend_batch(asked, dict.fromkeys((each.id for each in asked), 0.01))
        assert {answer.outcome for answer in ask(asked, anything, llm, ledger)} == {"answered"}


def test_a_batch_of_an_older_prompt_is_read_once_it_has_ended_and_counts_as_spent_until_then(path: Path) -> None:
    old, new = [question(n) for n in range(6)], [question(n, system="another prompt") for n in range(6)]
    with MessagesStub() as stub, Ledger(path) as ledger:
        llm = config(stub, mode="batch")
        requests = [{"custom_id": each.id, "params": request_of(each, llm)} for each in old]
        ledger.add(old)
        ledger.name_batch(ledger.intend_batch(old, {each.id: 0.01 for each in old}), stub.start_batch(requests)["id"])
        batch = next(iter(stub.batches.values()))
        batch["created"] += 3600
        with pytest.raises(BadInput, match=r"\$0\.0600\) are spent already|\(\$0\.0600 are spent already\)"):
            ask(new, anything, config(stub, mode="batch", max_usd=0.06), ledger)
        ask(new[:3], anything, llm, ledger)
        assert len(ledger.open_batches()) == 1
        batch["created"] -= 3600
        ask(new, anything, llm, ledger)
        assert not ledger.open_batches() and ledger.unknown() == 0
    assert rows(path, "SELECT count(*) FROM attempts WHERE status = 'response' AND usd > 0") == [(12,)]


def test_an_intended_batch_that_was_never_created_is_asked_anew(path: Path) -> None:
    asked = [question(n) for n in range(5)]
    with MessagesStub() as stub, Ledger(path) as ledger:
        ledger.add(asked)
        ledger.intend_batch(asked, {each.id: 0.01 for each in asked})  # and the process is killed
        answers = ask(asked, anything, config(stub, mode="batch"), ledger)
        assert ledger.open_batches() == []
    assert {answer.outcome for answer in answers} == {"answered"} and set(stub.paid.values()) == {1}
    assert rows(path, "SELECT status, count(*) FROM attempts GROUP BY status") == [("error", 5), ("response", 5)]


def test_results_that_were_read_in_part_are_read_to_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [question(n) for n in range(6)]

    class Killed(Exception):
        pass

    with MessagesStub() as stub:
        llm = config(stub, mode="batch")
        complete, count = Ledger.complete, iter(range(100))

        def die_at_the_third(self: Ledger, *arguments: object) -> None:
            if next(count) == 2:
                raise Killed
            complete(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Ledger, "complete", die_at_the_third)
        with Ledger(path) as ledger, pytest.raises(Killed):
            ask(asked, anything, llm, ledger)
        monkeypatch.setattr(Ledger, "complete", complete)
        with Ledger(path) as ledger:
            answers = ask(asked, anything, llm, ledger)
    assert {answer.outcome for answer in answers} == {"answered"}
    assert len(stub.batches) == 1 and set(stub.paid.values()) == {1}


def test_batches_are_no_larger_than_what_the_budget_covers_at_worst(path: Path) -> None:
    asked = [question(n, max_tokens=4000) for n in range(30)]
    with MessagesStub(answer=lambda body: {"category": "tool", "reason": "r" * 15_950}) as stub, Ledger(path) as ledger:
        # At half price an answer costs $0.02 and is expected to cost $0.004.
        with pytest.raises(BudgetSpent, match="of 30 questions"):
            ask(asked, anything, config(stub, mode="batch", max_usd=0.3), ledger)
        assert 0.2 < ledger.spent() <= 0.3


def test_large_studies_are_cut_into_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_REQUESTS", 4)
    with MessagesStub() as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(10)], anything, config(stub, mode="batch"), ledger)
        assert [len(batch["requests"]) for batch in stub.batches.values()] == [4, 4, 2]
    assert {answer.outcome for answer in answers} == {"answered"}


def test_a_server_without_batches_is_named(path: Path) -> None:
    with MessagesStub(local=True) as stub, Ledger(path) as ledger:
        with pytest.raises(BadInput, match=r"analysis\.llm\.mode=batch: the server at .* has no message batches"):
            ask([question(1, model="local-model")], anything, config(stub, mode="batch"), ledger)
        assert not stub.bodies


def test_polling_waits_in_between(path: Path) -> None:
    with MessagesStub(batch_s=0.5) as stub, Ledger(path) as ledger:
        started = time.monotonic()
        ask([question(1)], anything, config(stub, mode="batch", poll_s=0.2), ledger)
        assert time.monotonic() - started >= 0.5
    assert stub.calls["GET /v1/messages/batches/msgbatch_0000"] <= 5
