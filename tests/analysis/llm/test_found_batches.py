"""Batches of runs that were killed or stopped are found again, whatever was lost, and not paid for twice unsaid."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from analysis.llm.asking import ask
from analysis.llm.ledger import Ledger
from analysis.llm.messages import request_of
from extract.errors import BadInput
from tests.analysis.asked import anything, config, fates, question, rows
from tests.analysis.messages_rules import content_of
from tests.analysis.messages_stub import MessagesStub


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
        intended = ledger.intend_batch(old, {each.id: 0.01 for each in old})
        ledger.name_batch(intended.number, stub.start_batch(requests)["id"])
        batch = next(iter(stub.batches.values()))
        batch["created"] += 3600
        with pytest.raises(BadInput, match=r"max_usd \(\$0\.06, of which \$0\.0600 are spent\)"):
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


def test_a_batch_that_may_be_ours_is_waited_for_by_those_who_create_others(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [question(n) for n in range(5)]
    with MessagesStub(batch_s=0.8) as stub, Ledger(path) as ledger:
        of_others = [request_of(question(100 + n), config(stub)) for n in range(5)]
        stub.start_batch([{"custom_id": f"x{n}", "params": params} for n, params in enumerate(of_others)])
        ledger.add(asked)
        ledger.intend_batch(asked, {each.id: 0.01 for each in asked})
        # Its questions are asked one by one meanwhile; it counts as spent until no batch can be it.
        assert {answer.outcome for answer in ask(asked, anything, config(stub), ledger)} == {"answered"}
        said = capsys.readouterr().out
        assert ledger.unknown() == pytest.approx(0.05) and "mode=sync does not wait" not in said
        assert said.count("batch msgbatch_0000 may hold 5 questions of this study, which are asked again now") == 1
        ask(asked, anything, config(stub), ledger)
        ask([*asked, question(6)], anything, config(stub), ledger)  # of which the batch holds none
        assert "may hold" not in capsys.readouterr().out
        asked.append(question(5))
        ledger.add(asked)
        ledger.intend_batch(asked[5:], {asked[5].id: 0.01})
        time.sleep(0.8)  # until that of the others has ended
        stub.start_batch([{"custom_id": "x", "params": of_others[0]}])
        started = time.monotonic()
        assert {each.outcome for each in ask(asked, anything, config(stub, mode="batch"), ledger)} == {"answered"}
        assert time.monotonic() - started > 0.5 and "mode=sync does not wait" in capsys.readouterr().out
        assert ledger.unknown() == 0


def test_a_batch_that_was_read_is_not_taken_for_one_whose_name_was_lost(path: Path) -> None:
    asked = [question(n) for n in range(2)]
    with MessagesStub(fates({f"thing {n}": ["truncated"] for n in range(2)})) as stub, Ledger(path) as ledger:
        llm = config(stub, mode="batch", max_attempts_per_answer=1)
        assert {answer.outcome for answer in ask(asked, anything, llm, ledger)} == {"truncated"}
        ledger.intend_batch(asked, {each.id: 0.01 for each in asked})  # and the process is killed
        answers = ask(asked, anything, config(stub, mode="batch"), ledger)
    assert {answer.outcome for answer in answers} == {"answered"}
    assert rows(path, "SELECT count(*) FROM attempts WHERE status = 'response'") == [(4,)]
