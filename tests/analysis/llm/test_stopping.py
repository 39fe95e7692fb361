"""Signals, other processes and kills: what came is kept, and what is under way is waited for a little."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from analysis.llm import ledger as ledger_module
from analysis.llm.asking import ask
from analysis.llm.ledger import Ledger
from extract.errors import BadInput
from tests.analysis.asked import anything, config, fates, question, rows
from tests.analysis.messages_stub import MessagesStub


def test_two_processes_do_not_ask_for_one_study(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "WAIT_S", 0.05)
    order = []

    def another() -> None:
        with Ledger(path):
            order.append("second")

    waiting = threading.Thread(target=another)
    with Ledger(path):
        waiting.start()
        time.sleep(0.4)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert capsys.readouterr().out.count("in use by another process") == 1


def interrupt(stub: MessagesStub, num_asked: int, times: int = 1) -> None:
    """Signals once so many requests have come, and again half a second later."""

    def wait() -> None:
        while len(stub.bodies) < num_asked:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    threading.Thread(target=wait, daemon=True).start()


def test_an_interrupt_keeps_what_is_under_way(path: Path) -> None:
    with MessagesStub(latency=0.3) as stub:
        interrupt(stub, num_asked=6)
        with Ledger(path) as ledger, pytest.raises(KeyboardInterrupt):
            ask([question(n) for n in range(40)], anything, config(stub, concurrency=4), ledger)
        asked = len(stub.bodies)
        assert 6 <= asked < 40
        # What was paid for was waited for.
        assert rows(path, "SELECT count(*) FROM questions WHERE outcome = 'answered'") == [(asked,)]
        assert rows(path, "SELECT count(*) FROM attempts WHERE status = 'sent'") == [(0,)]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with Ledger(path) as ledger:
            ask([question(n) for n in range(40)], anything, config(stub, concurrency=32), ledger)
    assert set(stub.paid.values()) == {1} and len(stub.paid) == 40


def test_a_second_interrupt_does_not_wait_for_what_is_under_way(path: Path) -> None:
    with MessagesStub(latency=8) as stub, Ledger(path) as ledger:
        interrupt(stub, num_asked=1, times=2)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask([question(1)], anything, config(stub, timeout_s=30), ledger)
        assert 0.4 < time.monotonic() - started < 6
        # It may be charged for.
        assert ledger.unknown() > 0
    assert rows(path, "SELECT status FROM attempts") == [("sent",)]


def left_behind(path: Path, copy: Path, query: str) -> list[tuple]:
    """What a ledger would hold if its process were killed now."""
    copy.mkdir()
    for file in path.parent.glob("requests.sqlite*"):
        shutil.copy(file, copy)
    return rows(copy / path.name, query)


def test_an_attempt_is_durable_before_its_request_is_sent(path: Path, tmp_path: Path) -> None:
    seen = []

    def plan(prompt: str, nth: int) -> str:
        seen.append(left_behind(path, tmp_path / "copy", "SELECT status, usd_unknown > 0 FROM attempts"))
        return "answer"

    with MessagesStub(plan) as stub, Ledger(path) as ledger:
        ask([question(1)], anything, config(stub), ledger)
    assert seen == [[("sent", 1)]]


def test_what_the_ledger_could_not_take_is_not_sent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, commit, full = [question(n) for n in range(6)], Ledger.commit, [True]

    def fail_once(self: Ledger) -> None:
        """As where the disk is full at the first attempt: SQLite rolls back."""
        if self._grouping and full and self._database.in_transaction:
            self._database.execute("ROLLBACK")
            full.clear()
            raise BadInput("the disk is full")
        commit(self)

    with MessagesStub() as stub, Ledger(path) as ledger:
        ledger.add(asked)
        begin = Ledger.begin

        def begin_on_a_full_disk(self: Ledger, *arguments: Any, **others: Any) -> int:
            monkeypatch.setattr(Ledger, "commit", fail_once)
            return begin(self, *arguments, **others)

        monkeypatch.setattr(Ledger, "begin", begin_on_a_full_disk)
        with pytest.raises(BadInput, match="the disk is full"):
            ask(asked, anything, config(stub, concurrency=4), ledger)
        assert not stub.paid and not full
        assert {answer.outcome for answer in ask(asked, anything, config(stub), ledger)} == {"answered"}
    assert set(stub.paid.values()) == {1}


def test_a_response_is_durable_while_others_are_waited_for(path: Path, tmp_path: Path) -> None:
    found: list[tuple] = []

    def look() -> None:
        query = "SELECT prompt, outcome, status FROM questions JOIN attempts ON question = id"
        found.extend(left_behind(path, tmp_path / "copy", query))

    with MessagesStub(fates({"thing 2": ["timeout"]})) as stub, Ledger(path) as ledger:
        timer = threading.Timer(1.5, look)
        timer.start()
        ask([question(n) for n in range(3)], anything, config(stub, timeout_s=2.5, concurrency=2), ledger)
    timer.join()
    assert sorted(found) == [
        ("thing 0", "answered", "response"),
        ("thing 1", "answered", "response"),
        ("thing 2", None, "sent"),
    ]
