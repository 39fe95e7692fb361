"""Shares, filters and counts by hand; a mixture continued from any document is the mixture."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from extract.config import CorpusConfig, SourceConfig
from extract.errors import BadInput
from extract.mixing import Mixture, SourceState, content_digest, digest_of
from tests import tiny

NO_SYSTEM = (
    "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    "{% for turn in messages %}{{ turn.content }}{% endfor %}"
)


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def mixed(corpus: CorpusConfig, seed: int = 0) -> list:
    return list(Mixture(corpus, tiny.tokenizer(), seed))


def test_shares_hold_to_the_token_and_along_the_way(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": "a" * (10 + i % 23)} for i in range(400)])
    b = write(tmp_path / "b.jsonl", [{"text": "b" * (40 + i % 61)} for i in range(400)])
    corpus = CorpusConfig([SourceConfig(a, share=3), SourceConfig(b, share=1)], num_tokens=4001)
    taken, worst = {"a": 0, "b": 0}, 0.0
    for document in Mixture(corpus, tiny.tokenizer()):
        taken[document.source] += len(document.token_ids)
        worst = max(worst, abs(taken["a"] - 3 * taken["b"]))
    assert taken == {"a": 3001, "b": 1000}  # 3/4 of 4001, rounded, and the rest
    assert worst <= 3 * 102  # never further apart than one longest document of b


def test_without_a_budget_every_document_comes_once(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": f"alpha text {i}"} for i in range(7)])
    b = write(tmp_path / "b.jsonl", [{"text": f"beta text {i}"} for i in range(3)])
    ids = [d.doc_id for d in mixed(CorpusConfig([SourceConfig(a), SourceConfig(b)]))]
    assert sorted(ids) == sorted([f"a/{i}" for i in range(7)] + [f"b/{i}" for i in range(3)])


def test_a_source_that_is_too_small_is_named_with_what_became_of_it(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", [{"text": "a" * 20}, {"text": "b"}, {"text": ""}])
    message = r"source a holds 21 tokens; .*num_tokens=100 is 100 \(3 read, 1 kept, 21 tokens, 1 empty, 1 too short\)"
    with pytest.raises(BadInput, match=message):
        mixed(CorpusConfig([SourceConfig(a)], num_tokens=100))


def test_a_source_that_gives_nothing_says_why(tmp_path: Path):
    record = {"messages": [{"role": "system", "content": "always"}]}
    a = write(tmp_path / "a.jsonl", [record, record])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(
        BadInput, match=r"a.jsonl holds no document that.*2 refused; first chat refused: a/0: no system"
    ):
        list(Mixture(CorpusConfig([SourceConfig(a)]), tokenizer))


def test_malformed_records_are_counted_and_the_first_is_named(tmp_path: Path):
    turns = [{"role": "user", "content": None}]
    records = [{"text": "a" * 9}, {"messages": turns}, {"text": "b" * 9}, {"text": 3}]
    source = SourceConfig(write(tmp_path / "a.jsonl", records))
    whole = Mixture(CorpusConfig([source]), tiny.tokenizer())
    assert [document.text for document in whole] == ["a" * 9, "b" * 9]
    assert whole.states[0].counts == {"read": 4, "kept": 2, "tokens": 20, "malformed": 2}
    assert str(whole.states[0]).startswith(
        "4 read, 2 kept, 20 tokens, 2 malformed; first malformed: a.jsonl, line 2: a"
    )
    with pytest.raises(BadInput, match="2 malformed; first malformed: a.jsonl, line 2: a chat turn must be"):
        mixed(CorpusConfig([source], num_tokens=100))


def test_every_record_is_counted_once(tmp_path: Path):
    """One byte is one token, and BOS is one more: a context of 20 cuts texts of 20 bytes and more."""
    texts = ["x" * 500, "yy", "", " \n", "q" * 19, "r" * 20, "long enough", "w" * 600, "x" * 500]
    records = [{"text": text, "language": "en"} for text in texts] + [{"text": "bonjour à tous", "language": "fr"}]
    source = SourceConfig(write(tmp_path / "a.jsonl", records), languages=["en"])
    corpus = CorpusConfig([source], context_length=20, min_tokens=8, max_tokens=550, deduplicate=True)
    mixture = Mixture(corpus, tiny.tokenizer())
    documents = list(mixture)
    assert [len(d.token_ids) for d in documents] == [20, 20, 20, 12]
    assert documents[0].text == "x" * 500  # the text stays whole
    left_out = {"empty": 2, "other_language": 1, "too_short": 1, "too_long": 1, "duplicate": 1}
    assert mixture.states[0].counts == {"read": 10, "kept": 4, "tokens": 72, "truncated": 2, **left_out}


def test_duplicates_are_found_across_sources_and_only_exact_ones(tmp_path: Path):
    same, chat = "the same document", [{"role": "user", "content": "the same document"}]
    records = [{"text": same}, {"text": same + "."}, {"messages": chat}]
    a, b = write(tmp_path / "a.jsonl", records), write(tmp_path / "b.jsonl", [*records, {"text": "only here, once"}])
    corpus = CorpusConfig([SourceConfig(a), SourceConfig(b)], deduplicate=True)
    mixture = Mixture(corpus, tiny.tokenizer())
    hashes = [document.content_sha256 for document in mixture]
    assert len(hashes) == len(set(hashes)) == 4
    assert sum(state.duplicate for state in mixture.states) == 3
    assert len(mixed(replace(corpus, deduplicate=False))) == 7


def test_the_seed_orders_documents_only_where_that_is_asked_for(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
    plain = CorpusConfig([SourceConfig(path)])
    shuffled = replace(plain, shuffle_buffer=30)
    ids = [[d.doc_id for d in mixed(corpus, seed)] for corpus in (plain, shuffled) for seed in (0, 1)]
    assert ids[0] == ids[1] == [f"a/{i}" for i in range(100)]
    assert ids[2] != ids[3] and sorted(ids[2]) == sorted(ids[3]) == sorted(ids[0])
    assert ids[2] == [d.doc_id for d in mixed(shuffled, 0)]


@pytest.mark.parametrize(("window", "num_tokens"), [(0, None), (7, None), (0, 1200), (7, 1200)])
def test_a_mixture_continued_from_any_document_is_the_mixture(tmp_path: Path, window: int, num_tokens: int | None):
    texts = ["", "tiny", "a text of some length ", "another one", "the last of these texts, rather long "]
    a = write(tmp_path / "a.jsonl", [{"text": f"{texts[i % 5]}{i % 23}"} for i in range(90)])
    b = write(tmp_path / "b.jsonl", [{"text": f"{texts[(3 * i) % 5]}{i % 47}"} for i in range(80)])
    sources = [SourceConfig(a, share=1), SourceConfig(b, share=2)]
    corpus = CorpusConfig(sources, num_tokens, 40, shuffle_buffer=window, deduplicate=True)
    whole = Mixture(corpus, tiny.tokenizer(), seed=3)
    documents, stands = [], [[asdict(state) for state in whole.states]]
    for document in whole:
        documents.append(document)
        stands.append([asdict(state) for state in whole.states])
    assert len(documents) > 20 and stands[-1][1]["duplicate"]
    for given in range(len(documents) + 1):
        seen = {content_digest(document.content_sha256) for document in documents[:given]}
        states = [SourceState(**state) for state in stands[given]]
        rest = Mixture(corpus, tiny.tokenizer(), 3, states, seen)
        assert [d.doc_id for d in rest] == [d.doc_id for d in documents[given:]]
        assert rest.states == whole.states


def test_the_digest_of_what_was_read_sees_all_that_decides_the_tokens(tmp_path: Path):
    record = {"doc_id": "a", "text": "one text", "language": "en", "tags": {"topic": "x"}}
    changes: list[dict] = [{"text": "a text"}, {"doc_id": "b"}, {"language": "de"}, {"tags": {"topic": "y"}}]
    digests = []
    for first in [record, *({**record, **change} for change in changes)]:
        path = write(tmp_path / "a.jsonl", [first, record, {"text": "not read yet", "language": "en"}])
        corpus = CorpusConfig([SourceConfig(path, languages=["en"])])
        digests.append(digest_of(corpus, corpus.sources[0], seed=0, count=2))
    assert len(set(digests)) == 1 + len(changes)
    path = write(tmp_path / "a.jsonl", [record, record, {"text": "another"}, record])
    assert digest_of(corpus, corpus.sources[0], seed=0, count=2) == digests[0]
