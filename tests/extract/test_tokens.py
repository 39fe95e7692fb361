import json
from pathlib import Path

import numpy as np
import pytest

from extract.command import compose
from extract.config import CorpusConfig, ExtractSettings, SourceConfig
from extract.corpus import Document, check_source, read_source
from extract.errors import BadInput
from extract.tokens import encode_chat, make_tokens, mixed, study_tokenizer
from tests import tiny


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_shares_hold_to_the_token_and_along_the_way(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": "a" * (10 + i % 23)} for i in range(400)])
    b = write(tmp_path / "b.jsonl", [{"text": "b" * (40 + i % 61)} for i in range(400)])
    corpus = CorpusConfig([SourceConfig(a, share=3), SourceConfig(b, share=1)], num_tokens=4001)
    taken, worst = {"a": 0, "b": 0}, 0.0
    for document in mixed(corpus, tiny.tokenizer()):
        taken[document.source] += len(document.token_ids)
        worst = max(worst, abs(taken["a"] - 3 * taken["b"]))
    assert taken == {"a": 3001, "b": 1000}  # 3/4 of 4001, rounded, and the rest
    assert worst <= 3 * 102  # never further apart than one longest document of b


def test_without_a_budget_every_document_comes_once(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": f"alpha text {i}"} for i in range(7)])
    b = write(tmp_path / "b.jsonl", [{"text": f"beta text {i}"} for i in range(3)])
    ids = [d.doc_id for d in mixed(CorpusConfig([SourceConfig(a), SourceConfig(b)]), tiny.tokenizer())]
    assert sorted(ids) == sorted([f"a/{i}" for i in range(7)] + [f"b/{i}" for i in range(3)])


def test_a_source_that_is_too_small_is_named(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": "a" * 20}])
    with pytest.raises(BadInput, match=r"source a holds 21 tokens; .*num_tokens=100 is 100"):
        list(mixed(CorpusConfig([SourceConfig(a)], num_tokens=100), tiny.tokenizer()))


def test_long_documents_are_cut_and_short_ones_left_out(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": "x" * 500}, {"text": "yy"}, {"text": ""}])
    kept = list(mixed(CorpusConfig([SourceConfig(a)], context_length=64, min_tokens=8), tiny.tokenizer()))
    assert [len(d.token_ids) for d in kept] == [64]


def test_a_chat_has_one_bos_and_spans_of_its_contents():
    tokenizer = tiny.tokenizer()
    turns = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi héllo"}]
    document = encode_chat(tokenizer, Document("d", "s", None, turns))
    ids = document.token_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert [tokenizer.decode(ids[start:end]) for _, start, end in document.roles] == ["héllo", "hi héllo"]
    assert [role for role, _, _ in document.roles] == ["user", "assistant"]


def test_a_chat_without_any_template_is_refused():
    with pytest.raises(BadInput, match="no model of the study has a chat template"):
        encode_chat(tiny.tokenizer(chat=False), Document("d7", "s", None, [{"role": "user", "content": "x"}]))


def test_different_tokenizers_are_shown(study: list[str], tmp_path: Path):
    other = tiny.save_model(tmp_path / "other")
    tiny.tokenizer(extra="zzz").save_pretrained(other)
    settings = compose(ExtractSettings, [*study, f"models.tuned={other}"])
    with pytest.raises(BadInput, match="different tokenizers.*zzz"):
        study_tokenizer(settings)


def test_tokens_are_made_once_and_refused_under_other_settings(study: list[str], capsys: pytest.CaptureFixture):
    settings = compose(ExtractSettings, study)
    first = make_tokens(settings)
    shard = first.folder / "shard-00000.tar"
    before = shard.stat().st_mtime_ns
    assert make_tokens(settings).num_documents == first.num_documents and shard.stat().st_mtime_ns == before
    assert "documents" in capsys.readouterr().out
    with pytest.raises(BadInput, match="made with other settings"):
        make_tokens(compose(ExtractSettings, [*study, "corpus.context_length=10"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n\xff\xfe', "line 2 is not UTF-8"),
        (b'{"text": "ok"}\n{"text": ', "line 2 is not JSON"),
        (b'{"body": "ok"}', r"neither 'text' nor 'messages', but \['body'\]"),
        (b'{"text": 3}', "'text' is int"),
        (b"[1]", "not a JSON object"),
        (b'{"messages": [{"from": "user"}]}', "a chat turn must be"),
    ],
)
def test_records_that_cannot_be_read_are_named_with_file_and_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_source(SourceConfig(str(path))))


@pytest.mark.parametrize("path", ["", "missing.jsonl", "/nowhere/at/all"])
def test_a_path_that_leads_nowhere_is_refused(path: str):
    with pytest.raises(BadInput):
        check_source(SourceConfig(path))


def test_text_that_is_not_utf8_is_found_before_anything_is_written(study: list[str], tmp_path: Path):
    good = b'{"text": "long enough to be kept"}\n' * 100
    path = tmp_path / "late.jsonl"
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    with pytest.raises(BadInput, match="late.jsonl, line 101 is not UTF-8"):
        make_tokens(compose(ExtractSettings, [*study, f"corpus={path}"]))
    path.write_bytes(good)
    assert make_tokens(compose(ExtractSettings, [*study, f"corpus={path}"])).num_documents == 100


def test_a_source_without_documents_is_named(study: list[str], tmp_path: Path, corpus_file: Path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    sources = f"corpus.sources=[{{path: '{corpus_file}'}}, {{path: '{blank}'}}]"
    with pytest.raises(BadInput, match="blank.jsonl holds no document"):
        make_tokens(compose(ExtractSettings, [*study, sources]))


def test_a_model_can_join_a_study_whose_tokens_exist(study: list[str], tmp_path: Path):
    before = make_tokens(compose(ExtractSettings, study))
    third = tiny.save_model(tmp_path / "third", seed=7)
    after = make_tokens(compose(ExtractSettings, [*study, f"models.tuned={third}"]))
    assert after.manifest.content_sha256() == before.manifest.content_sha256()


@pytest.mark.parametrize("setting", ["num_tokens=0", "context_length=0", "sources=[{path: x.jsonl, share: 0}]"])
def test_numbers_that_make_no_corpus_are_refused(study: list[str], setting: str):
    with pytest.raises(BadInput, match="corpus"):
        compose(ExtractSettings, [*study, f"corpus.{setting}"])


def test_a_quote_in_the_name_of_a_corpus(tmp_path: Path):
    settings = compose(ExtractSettings, ["experiment=demo", "corpus=it's here.jsonl"])
    assert settings.corpus.sources[0].path == "it's here.jsonl"


def test_an_empty_file_is_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(BadInput, match="is empty"):
        check_source(SourceConfig(str(tmp_path / "empty.jsonl")))


def test_parquet_folders_and_datasets_give_the_same_documents(tmp_path: Path):
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    records = [{"text": f"text number {i}"} for i in range(5)]
    folder = tmp_path / "parts"
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(records[:3]), folder / "0.parquet")
    write(folder / "1.jsonl", records[3:])
    texts = [d.text for d in read_source(SourceConfig(str(folder)))]
    datasets.Dataset.from_list(records).to_json(tmp_path / "hub.json")
    hub = tmp_path / "hub"
    hub.mkdir()
    (tmp_path / "hub.json").rename(hub / "train.json")  # a folder that only `datasets.load_dataset` understands
    assert texts == [d.text for d in read_source(SourceConfig(str(hub)))] == [r["text"] for r in records]


def test_a_dataset_that_cannot_be_opened_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="neither a file nor a dataset that could be opened"):
        next(read_source(SourceConfig("nobody/nothing")))


def test_token_ids_are_those_of_the_tokenizer(study: list[str]):
    settings = compose(ExtractSettings, study)
    tokenizer = study_tokenizer(settings)
    for document in make_tokens(settings):
        if document.text:
            assert np.array_equal(document.token_ids, tokenizer(document.text)["input_ids"])
