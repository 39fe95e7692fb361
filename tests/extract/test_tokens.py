"""`extract.tokens` from the settings to the shards: begun, killed, continued, refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from extract.command import compose
from extract.config import ExtractSettings
from extract.encoding import Encoder
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.mixing import SourceState
from extract.tokenizer import study_tokenizer
from extract.tokens import make_tokens
from tests import tiny


@pytest.fixture
def long_study(study: list[str], tmp_path: Path) -> list[str]:
    """A study of two sources that fill 60 shards, with filters, duplicates, chats and a shuffle."""
    for name in "ab":
        texts = [f"{name if i % 3 else ''} document {i % 700} " * (i % 9) for i in range(1500)]
        records = [{"text": text} if i % 4 else {"messages": [{"role": "user", "content": text}]}
                   for i, text in enumerate(texts)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    sources = f"corpus.sources=[{{path: '{tmp_path}/a.jsonl', share: 2}}, {{path: '{tmp_path}/b.jsonl'}}]"
    return [*study, sources, "corpus.deduplicate=true", "corpus.shuffle_buffer=50", "corpus.tokens_per_shard=1500"]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def test_tokens_are_made_once_and_refused_under_other_settings(study: list[str], capsys: pytest.CaptureFixture):
    settings = compose(ExtractSettings, study)
    first = make_tokens(settings)
    shard = first.folder / "shard-00000.tar"
    before = shard.stat().st_mtime_ns
    assert make_tokens(settings).num_documents == first.num_documents and shard.stat().st_mtime_ns == before
    assert "documents" in capsys.readouterr().out
    with pytest.raises(BadInput, match="made with other settings"):
        make_tokens(compose(ExtractSettings, [*study, "corpus.context_length=10"]))


def test_the_seed_is_part_of_the_tokens_only_where_it_orders_them(study: list[str]):
    make_tokens(compose(ExtractSettings, study))
    make_tokens(compose(ExtractSettings, [*study, "seed=1"]))
    shuffled = [*study, "corpus.shuffle_buffer=10", "store=${outputs}/shuffled"]
    zero = make_tokens(compose(ExtractSettings, shuffled))
    with pytest.raises(BadInput, match="seed: 0 there, 1 now"):
        make_tokens(compose(ExtractSettings, [*shuffled, "seed=1"]))
    one = make_tokens(compose(ExtractSettings, [*shuffled, "seed=1", "store=${outputs}/other"]))
    ids = [[document.doc_id for document in store] for store in (zero, one)]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(long_study: list[str], tmp_path: Path):
    whole = make_tokens(compose(ExtractSettings, long_study))
    expected = shards(whole.folder)
    assert len(expected) > 40
    arguments = [*long_study, f"store={tmp_path / 'killed'}"]
    folder, chance = tmp_path / "killed" / "tokens", random.Random(0)
    for _ in range(3):
        there = len(list(folder.glob("*.index")))
        process = subprocess.Popen([sys.executable, "-m", "extract.tokens", *arguments], stdout=subprocess.DEVNULL)
        while len(list(folder.glob("*.index"))) < there + 3 and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (folder / "manifest.json").exists()
    store = make_tokens(compose(ExtractSettings, arguments))
    assert shards(folder) == expected
    assert store.manifest.content_sha256() == whole.manifest.content_sha256()
    assert store.manifest.provenance["sources"] == whole.manifest.provenance["sources"]


def test_what_is_done_is_not_tokenised_again(long_study: list[str], monkeypatch: pytest.MonkeyPatch):
    settings = compose(ExtractSettings, long_study)
    whole = make_tokens(settings)
    expected, ids = shards(whole.folder), [document.doc_id for document in whole]
    missing = sorted(expected)[-12]  # 6 of the archives and indexes from here on
    (whole.folder / "manifest.json").unlink()
    for path in whole.folder.glob("shard-*"):
        if path.name >= missing:
            path.unlink()
    done = sum(len(json.loads(data)["documents"]) for name, data in shards(whole.folder).items() if "index" in name)
    encode, encoded = Encoder.encode, []
    monkeypatch.setattr(Encoder, "encode", lambda self, some: encoded.extend(some) or encode(self, some))
    assert [document.doc_id for document in make_tokens(settings)] == ids and shards(whole.folder) == expected
    assert {document.doc_id for document in encoded} >= set(ids[done:])
    assert not {document.doc_id for document in encoded} & set(ids[:done])


def test_a_shard_that_was_damaged_is_made_again(long_study: list[str]):
    settings = compose(ExtractSettings, long_study)
    folder = make_tokens(settings).folder
    expected = shards(folder)
    (folder / "manifest.json").unlink()
    shard = folder / "shard-00003.tar"
    os.truncate(shard, shard.stat().st_size - 1)
    make_tokens(settings)
    assert shards(folder) == expected


def test_counts_are_printed_and_kept(study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    """One byte is one token, and BOS is one more."""
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["x" * 50, "", "short", "y" * 10]))
    store = make_tokens(compose(ExtractSettings, [*study, f"corpus={path}", "corpus.context_length=30"]))
    counts = store.manifest.provenance["sources"]["few"]
    expected = {"read": 4, "kept": 2, "tokens": 41, "truncated": 1, "empty": 1, "too_short": 1}
    assert SourceState(**counts).counts == expected
    line = "source few: 100.0% of the tokens; 4 read, 2 kept, 41 tokens, 1 truncated, 1 empty, 1 too short"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_corpus_that_changed_is_named(study: list[str], tmp_path: Path, is_finished: bool):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(100)))
    settings = compose(ExtractSettings, [*study, f"corpus={path}"])
    folder = make_tokens(settings).folder
    if not is_finished:
        (folder / "manifest.json").unlink()
        (folder / "shard-00002.index").unlink()
    path.touch()  # a new time alone is no change
    make_tokens(settings)
    path.write_text(path.read_text().replace("number 99", "number 66"))
    with pytest.raises(
        BadInput, match=r"source mine: its file mine.jsonl has changed since the tokens in .*store=PATH"
    ):
        make_tokens(settings)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_store_and_its_corpus_may_be_moved(study: list[str], tmp_path: Path, is_finished: bool):
    """The same files under other paths are the same corpus; under other names they are another."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "folder").mkdir()
    bad = [{"text": 3}, {"messages": None, "text": "of a length that is kept"}]
    (before / "folder" / "1.jsonl").write_text("\n".join(json.dumps(record) for record in bad))
    (before / "mine.jsonl").write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(100)))
    (before / "own.jinja").write_text(tiny.CHAT_TEMPLATE)

    def settings(place: Path) -> ExtractSettings:
        sources = f"corpus.sources=[{{path: '{place}/folder'}}, {{path: '{place}/mine.jsonl'}}]"
        template = f"corpus.chat_template={place}/own.jinja"
        return compose(ExtractSettings, [*study, sources, template, f"outputs={place}/outputs"])

    whole = make_tokens(settings(before))
    expected, content = shards(whole.folder), whole.manifest.content_sha256()
    if not is_finished:
        (whole.folder / "manifest.json").unlink()
        (whole.folder / "shard-00002.index").unlink()
    after = tmp_path / "elsewhere" / "after"
    after.parent.mkdir()
    before.rename(after)
    store = make_tokens(settings(after))
    assert store.folder.is_relative_to(after) and shards(store.folder) == expected
    assert store.manifest.content_sha256() == content
    settings_there = settings(after)
    settings_there.store = str(after / "fresh")
    fresh = make_tokens(settings_there)
    assert shards(fresh.folder) == expected and fresh.manifest.content_sha256() == content
    (after / "folder" / "1.jsonl").rename(after / "folder" / "2.jsonl")
    with pytest.raises(BadInput, match="source folder: its file 1.jsonl is gone"):
        make_tokens(settings(after))


def test_an_error_amid_the_corpus_keeps_what_is_finished(
    study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("extract.records.CHECKED_BYTES", 1000)
    monkeypatch.setattr("extract.corpus.FIRST_DOCUMENTS", 10)
    good = b"".join(json.dumps({"text": f"document number {i}"}).encode() + b"\n" for i in range(1000))
    path = tmp_path / "late.jsonl"
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    settings = compose(ExtractSettings, [*study, f"corpus={path}"])
    with pytest.raises(BadInput, match="late.jsonl, line 1001 is not UTF-8"):
        make_tokens(settings)
    before = shards(settings.tokens_folder)
    assert len(before) > 50 and not (settings.tokens_folder / "manifest.json").exists()
    mended = good + '{"text": "long enough café"}\n'.encode()
    path.write_bytes(mended.replace(b"number 3", b"number 8", 1))  # a document that was read is another now
    with pytest.raises(BadInput, match="late.jsonl has changed since the tokens"):
        make_tokens(settings)
    path.write_bytes(mended)
    store = make_tokens(settings)
    assert store.num_documents == 1001 and before.items() <= shards(store.folder).items()
    assert make_tokens(compose(ExtractSettings, settings.composed_from)).num_documents == 1001
    fresh = make_tokens(compose(ExtractSettings, [*settings.composed_from, "store=${outputs}/fresh"]))
    assert fresh.manifest.content_sha256() == store.manifest.content_sha256()


def test_text_that_is_not_utf8_is_found_before_anything_is_written(study: list[str], tmp_path: Path):
    good = b'{"text": "long enough to be kept"}\n' * 2000  # beyond the first documents that are looked at
    path = tmp_path / "late.jsonl"
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    settings = compose(ExtractSettings, [*study, f"corpus={path}"])
    with pytest.raises(BadInput, match="late.jsonl, line 2001 is not UTF-8"):
        make_tokens(settings)
    assert not settings.tokens_folder.exists()
    path.write_bytes(good)
    assert make_tokens(settings).num_documents == 2000


def test_a_source_without_documents_is_named(study: list[str], tmp_path: Path, corpus_file: Path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    sources = f"corpus.sources=[{{path: '{corpus_file}'}}, {{path: '{blank}'}}]"
    with pytest.raises(BadInput, match="blank.jsonl holds no document"):
        make_tokens(compose(ExtractSettings, [*study, sources]))


def test_a_chat_without_any_template_is_refused_before_anything_is_written(study: list[str], tmp_path: Path):
    models = [f"models.{name}={tiny.save_model(tmp_path / name, chat=False)}" for name in ("base", "tuned")]
    settings = compose(ExtractSettings, [*study, *models])
    with pytest.raises(BadInput, match="no model of the study has a chat template"):
        make_tokens(settings)
    assert not settings.tokens_folder.exists()


def test_a_model_can_join_a_study_whose_tokens_exist(study: list[str], tmp_path: Path):
    before = make_tokens(compose(ExtractSettings, study))
    third = tiny.save_model(tmp_path / "third", seed=7)
    after = make_tokens(compose(ExtractSettings, [*study, f"models.tuned={third}"]))
    assert after.manifest.content_sha256() == before.manifest.content_sha256()


@pytest.mark.parametrize(
    "setting",
    ["num_tokens=0", "context_length=0", "max_tokens=7", "shuffle_buffer=-1", "sources=[{path: x.jsonl, share: 0}]"],
)
def test_numbers_that_make_no_corpus_are_refused(study: list[str], setting: str):
    with pytest.raises(BadInput, match="corpus"):
        compose(ExtractSettings, [*study, f"corpus.{setting}"])


def test_a_quote_in_the_name_of_a_corpus():
    settings = compose(ExtractSettings, ["experiment=demo", "corpus=it's here.jsonl"])
    assert settings.corpus.sources[0].path == "it's here.jsonl"


def test_token_ids_are_those_of_the_tokenizer(study: list[str]):
    settings = compose(ExtractSettings, study)
    tokenizer = study_tokenizer(settings)
    for document in make_tokens(settings):
        if document.text:
            assert np.array_equal(document.token_ids, tokenizer(document.text)["input_ids"])
        else:
            rendered = tokenizer.apply_chat_template(document.messages, tokenize=False)
            assert np.array_equal(document.token_ids, tokenizer(rendered, add_special_tokens=False)["input_ids"])


def test_the_index_says_where_the_sources_stand(long_study: list[str]):
    folder = make_tokens(compose(ExtractSettings, long_study)).folder
    indexes = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.index"))]
    tokens = np.cumsum([sum(count for _, count in index["documents"]) for index in indexes])
    stands = [index["resume"]["sources"] for index in indexes]
    assert [sum(state["tokens"] for state in stand.values()) for stand in stands] == tokens.tolist()
    final = Manifest.read(folder).provenance["sources"]
    assert all(stands[-1][name]["read"] <= state["read"] == 1500 for name, state in final.items())
