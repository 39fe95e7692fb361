"""What a record says, the order of documents, and mistakes that the first documents show."""

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from extract.config import CorpusConfig, SourceConfig
from extract.corpus import check_first_documents, check_source, check_sources, read_source, source_name
from extract.errors import BadInput
from tests import tiny

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def numbered(tmp_path: Path, count: int) -> SourceConfig:
    return SourceConfig(write(tmp_path / "n.jsonl", [{"text": str(i)} for i in range(count)]))


def order(source: SourceConfig, start: int = 0, seed: int = 0, window: int = 10) -> list[int]:
    return [int(document.text or "") for document in read_source(source, start, seed, window)]


def test_a_window_is_permuted_in_itself_and_the_seed_decides_how(tmp_path: Path):
    source = numbered(tmp_path, 47)
    drawn = order(source)
    windows = [drawn[i : i + 10] for i in range(0, 47, 10)]
    assert [sorted(window) for window in windows] == [list(range(i, min(i + 10, 47))) for i in range(0, 47, 10)]
    assert all(window != sorted(window) for window in windows)
    assert [w % 10 for w in windows[0]] != [w % 10 for w in windows[1]]  # not one permutation over and over
    assert order(source) == drawn != order(source, seed=1)
    assert order(source, window=0) == order(source, seed=5, window=0) == list(range(47))


def test_any_position_is_reached_without_what_came_before(tmp_path: Path):
    source = numbered(tmp_path, 47)
    drawn = order(source)
    assert all(order(source, start) == drawn[start:] for start in range(49))


def test_a_document_keeps_its_number_in_a_shuffled_source(tmp_path: Path):
    source = numbered(tmp_path, 20)
    assert all(document.doc_id == f"n/{document.text}" for document in read_source(source, 3, window=7))


def test_fields_have_the_names_that_the_source_gives_them(tmp_path: Path):
    record = {"id": 7, "body": "b", "lang": "en", "tags": {"topic": "x", "other": None}}
    path = write(tmp_path / "a.jsonl", [record, {"conversation": CHAT, "lang": "de"}])
    fields = {"text_field": "body", "messages_field": "conversation", "id_field": "id", "language_field": "lang"}
    text, chat = read_source(SourceConfig(path, name="s", languages=["en"], **fields))
    assert (text.doc_id, text.source, text.text, text.language, text.tags) == ("7", "s", "b", "en", {"topic": "x"})
    assert (chat.doc_id, chat.messages, chat.text, chat.language) == ("s/1", CHAT, None, "de")


def test_lmsys_and_parquet_columns(tmp_path: Path):
    """The layout of LMSys-Chat-1M; columns that a row does not use are null in Parquet."""
    rows = [{"conversation_id": "c1", "conversation": CHAT, "language": "English", "turn": 1, "text": None}]
    parquet.write_table(pa.Table.from_pylist([*rows, {"text": "plain"}]), tmp_path / "a.parquet")
    source = SourceConfig(str(tmp_path / "a.parquet"), messages_field="conversation", id_field="conversation_id")
    chat, text = read_source(source)
    assert (chat.doc_id, chat.messages) == ("c1", CHAT) and (text.doc_id, text.text) == ("a/1", "plain")


@pytest.mark.parametrize(
    ("record", "empty"),
    [
        ({"text": ""}, True),
        ({"text": None}, True),
        ({"text": " \n\t"}, True),
        ({"text": " x "}, False),
        ({"messages": []}, True),
        ({"messages": [{"role": "user", "content": " "}]}, True),
        ({"messages": CHAT}, False),
    ],
)
def test_what_counts_as_empty(tmp_path: Path, record: dict, empty: bool):
    (document,) = read_source(SourceConfig(write(tmp_path / "a.jsonl", [record])))
    assert document.is_empty == empty


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n\xff\xfe', "line 2 is not UTF-8"),
        (b'{"text": "ok"}\n{"text": ', "line 2 is not JSON"),
        (b'{"body": "ok"}', r"neither 'text' nor 'messages', but \['body'\]"),
        (b"[1]", "not a JSON object"),
        (
            rb'{"text": "a \ud83d\ude00"}' + b"\n" + rb'{"text": "a \ud83d b"}',
            r"line 2 holds .ud83d, half of a character",
        ),
    ],
)
def test_records_that_cannot_be_read_are_named_with_file_and_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_source(SourceConfig(str(path))))


PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
CALL = [*CHAT, {"role": "assistant", "content": None, "tool_calls": []}]
MALFORMED = [
    ({"text": 3}, "'text' is int, not text"),
    ({"messages": "hi"}, "a chat must be a list of turns, not 'hi'"),
    ({"messages": [{"from": "user", "value": "hi"}]}, "a chat turn must be .*not {'from'"),
    ({"messages": PARTS}, "a chat turn must be .*not {'role': 'user', 'content': .{'type'"),
    ({"messages": CALL, "text": "x"}, "a chat turn must be .*'content': None"),
]


PLACES = {"jsonl": "a.jsonl, line 2", "folder": "a/a.jsonl, line 2", "parquet": "a.parquet, row 2", "saved": "a, row 2"}


@pytest.mark.parametrize(
    ("form", "record", "what"),
    [(form, *case) for form in PLACES for case in MALFORMED if form in ("jsonl", "folder") or "messages" in case[0]],
)
def test_a_record_of_another_shape_is_malformed_and_not_the_end(form: str, record: dict, what: str, tmp_path: Path):
    """Its place is named within the source, and what lies around it is read. A column of Parquet has one type: text is
    text in all rows or in none.
    """
    records = [{**dict.fromkeys(record), "text": "first"}, record]
    path = tmp_path / ("a" if form in ("folder", "saved") else f"a.{form}")
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    elif form == "saved":
        datasets.Dataset.from_list(records).save_to_disk(path)
    elif form == "folder":
        path.mkdir()
        write(path / "a.jsonl", records)
    else:
        write(path, records)
    first, malformed = read_source(SourceConfig(str(path)))
    assert (first.text, first.malformed, malformed.text, malformed.messages) == ("first", "", None, None)
    assert re.fullmatch(f"{PLACES[form]}: {what}.*", malformed.malformed), malformed.malformed


def test_a_source_that_is_malformed_from_the_start_is_refused(tmp_path: Path):
    bad = {"messages": [{"from": "human", "value": "hi"}]}
    source = SourceConfig(write(tmp_path / "a.jsonl", [bad] * 1001 + [{"text": "plain"}]))
    with pytest.raises(BadInput, match="a.jsonl, line 1: a chat turn must be.*'from': 'human'.*all of the first 1000"):
        check_first_documents(source, tiny.tokenizer())
    write(Path(source.path), [bad] * 999 + [{"text": "plain"}])
    check_first_documents(source, tiny.tokenizer())


def test_the_name_of_a_dataset_may_hold_a_dot():
    check_source(SourceConfig("mlfoundations/dclm-baseline-1.0"))


@pytest.mark.parametrize("path", ["", "missing.jsonl", "data/missing.jsonl.zst", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_leads_nowhere_is_refused(path: str):
    with pytest.raises(BadInput):
        check_source(SourceConfig(path))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.parquet", "folder"])
def test_what_is_empty_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
    with pytest.raises(BadInput, match=f"{name} is empty"):
        check_source(SourceConfig(str(tmp_path / name)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadInput, match="is a .txt file. Give .jsonl, .jsonl.zst, .parquet"):
        check_source(SourceConfig(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("path", "name"), [("d/a.jsonl", "a"), ("a.jsonl.zst", "a"), ("b.parquet", "b"), ("org/web", "web"), ("d/", "d")]
)
def test_a_source_is_named_after_its_path(path: str, name: str):
    assert source_name(SourceConfig(path)) == name and source_name(SourceConfig(path, name="own")) == "own"


def test_two_sources_of_one_name_are_refused(tmp_path: Path):
    source = numbered(tmp_path, 3)
    with pytest.raises(BadInput, match="2 sources are named 'n'"):
        check_sources(CorpusConfig([source, SourceConfig(source.path)]))
    check_sources(CorpusConfig([source, SourceConfig(source.path, name="again")]))


def test_a_language_that_does_not_occur_shows_those_that_do(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "language": name} for name in ("English", "German", "English")])
    check_first_documents(SourceConfig(path, languages=["German", "Welsh"]), tiny.tokenizer())
    with pytest.raises(BadInput, match=r"none of languages=\['english'\].*there are: English, German"):
        check_first_documents(SourceConfig(path, languages=["english"]), tiny.tokenizer())
    with pytest.raises(BadInput, match=r"no field 'lang' to compare.*\['language', 'text'\]"):
        check_first_documents(SourceConfig(path, languages=["English"], language_field="lang"), tiny.tokenizer())


def test_a_chat_without_a_template_is_refused_at_once(tmp_path: Path):
    source = SourceConfig(
        write(tmp_path / "a.jsonl", [{"text": "plain", "tags": ["none", "of", "ours"]}, {"messages": CHAT}])
    )
    check_first_documents(source, tiny.tokenizer())
    with pytest.raises(BadInput, match="holds chats, but no model of the study has a chat template"):
        check_first_documents(source, tiny.tokenizer(chat=False))
