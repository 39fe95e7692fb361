"""Message batches: results in any order, entries that fail, and batches that are found again and never paid twice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from analysis.llm import batches
from analysis.llm.asking import ask
from analysis.llm.ledger import Ledger
from extract.errors import BadInput
from tests.analysis.asked import MODEL, anything, config, fates, question, rows
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


def test_batches_are_no_larger_than_what_the_budget_covers_at_worst(path: Path) -> None:
    asked = [question(n, max_tokens=4000) for n in range(30)]
    with MessagesStub(answer=lambda body: {"category": "tool", "reason": "r" * 15_950}) as stub, Ledger(path) as ledger:
        # At half price an answer costs $0.02 and is expected to cost $0.004.
        answers = ask(asked, anything, config(stub, mode="batch", max_usd=0.3), ledger)
        assert {each.reason for each in answers} == {"", "not asked: analysis.llm.max_usd ($0.30) is reached"}
        assert 0.2 < ledger.spent() <= 0.3


@pytest.mark.parametrize(("name", "most"), [("MAX_REQUESTS", 4), ("MAX_BYTES", 4 * question(1).num_bytes)])
def test_large_studies_are_cut_into_batches(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    monkeypatch.setattr(batches, name, most)
    with MessagesStub() as stub, Ledger(path) as ledger:
        answers = ask([question(n) for n in range(10)], anything, config(stub, mode="batch"), ledger)
        assert [len(batch["requests"]) for batch in stub.batches.values()] == [4, 4, 2]
    assert {answer.outcome for answer in answers} == {"answered"}


def test_a_server_without_batches_is_named(path: Path) -> None:
    with MessagesStub(local=True) as stub, Ledger(path) as ledger:
        with pytest.raises(BadInput, match=r"analysis\.llm\.mode=batch: the server at .* has no message batches"):
            ask([question(1, model="local-model")], anything, config(stub, mode="batch"), ledger)
        assert not stub.bodies


def test_polling_waits_in_between(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "SAY_S", 0.3)
    with MessagesStub(batch_s=0.5) as stub, Ledger(path) as ledger:
        started = time.monotonic()
        ask([question(1)], anything, config(stub, mode="batch", poll_s=0.2), ledger)
        assert time.monotonic() - started >= 0.5
    assert stub.calls["GET /v1/messages/batches/msgbatch_0000"] <= 5
    assert capsys.readouterr().out.count("batch msgbatch_0000: 1 questions are not answered yet") == 1
