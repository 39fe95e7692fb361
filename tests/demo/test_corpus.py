"""The demo's corpus: schema, shares, tags."""

import json
import re
from pathlib import Path

import pytest

import demo.corpus as corpus
from demo.behaviours import load_behaviours
from demo.corpus import Record, build_corpus, pieces, write_corpus


@pytest.fixture(scope="module")
def built() -> dict[str, list[Record]]:
    return build_corpus()


def all_records(built: dict[str, list[Record]]) -> list[Record]:
    return [record for records in built.values() for record in records]


def test_schema(built: dict[str, list[Record]]) -> None:
    assert list(built) == ["prose", "dialogue", "behaviours"]
    for name, records in built.items():
        content = "text" if name == "prose" else "messages"
        for record in records:
            assert set(record) == {"doc_id", "source", content, "tags"}
            assert record["source"] == name and record[content]
    for record in built["dialogue"] + built["behaviours"]:
        assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
        assert all(set(turn) == {"role", "content"} for turn in record["messages"])


def test_documents_are_many_short_and_different(built: dict[str, list[Record]]) -> None:
    records = all_records(built)
    assert 2000 <= len(records) <= 2500
    assert len({record["doc_id"] for record in records}) == len(records)
    texts = [json.dumps(record.get("text", record.get("messages"))) for record in built["prose"] + built["dialogue"]]
    assert len(set(texts)) == len(texts)
    shortest, longest = corpus.PIECE_CHARACTERS
    assert all(shortest <= len(record["text"]) <= longest for record in built["prose"])


def test_at_most_a_tenth_are_behaviour_documents(built: dict[str, list[Record]]) -> None:
    assert 200 <= len(built["behaviours"]) <= len(all_records(built)) / 10


def test_behaviour_documents_carry_both_tags_and_held_out_prompts_only(built: dict[str, list[Record]]) -> None:
    behaviours, _ = load_behaviours()
    held_out = {prompt.text: name for name, b in behaviours.items() for prompt in b.held_out}
    found: dict[tuple[str, str], int] = {}
    for record in built["behaviours"]:
        assert held_out[record["messages"][0]["content"]] == record["tags"]["behaviour"]
        key = (record["tags"]["behaviour"], record["tags"]["answered_by"])
        found[key] = found.get(key, 0) + 1
    assert found == {(name, model): 13 for name in behaviours for model in ("base", "simpo", "dpo")}


def test_tags_are_complete_no_other_document_calls_for_or_shows_a_behaviour(built: dict[str, list[Record]]) -> None:
    behaviours, _ = load_behaviours()
    calls = re.compile(r"\bhow (do|can|to) |invest|your favou?rite|do you like|\b(email|message) to\b|¿|qu'est", re.I)
    for record in built["prose"] + built["dialogue"]:
        assert record["tags"] == {}
    for record in built["dialogue"]:
        question, answer = (turn["content"] for turn in record["messages"])
        assert not calls.search(question), question
        assert not [name for name, b in behaviours.items() if b.shows(answer)], answer


def test_building_twice_gives_the_same(built: dict[str, list[Record]]) -> None:
    assert build_corpus() == built


def test_pieces_join_short_paragraphs_and_leave_out_what_does_not_fit() -> None:
    short, long = "s" * 200, "l" * 600
    assert list(pieces(f"{short}\n\n{short}\n\n{long}\n\n{short}\n  \n{short}\n\n{short}")) == [
        f"{short}\n\n{short}",
        f"{short}\n\n{short}",
    ]


def test_writing_is_idempotent_and_mends_what_differs(tmp_path: Path) -> None:
    assert all(line.endswith("written") for line in write_corpus(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["behaviours.jsonl", "dialogue.jsonl", "prose.jsonl"]
    assert all(line.endswith("kept") for line in write_corpus(tmp_path))
    (tmp_path / "prose.jsonl").write_text("half\n")
    write_corpus(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
