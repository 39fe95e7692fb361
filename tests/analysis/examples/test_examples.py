"""The exact top documents against a full sort, and the SQLite file as any other program reads it."""

import json
import sqlite3
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from analysis.examples.database import (
    TokenStrings,
    _example_rows,
    _sample_rows,
    read_samples,
    significant,
    write_examples,
)
from analysis.examples.samples import DrawnSamples
from analysis.examples.top_documents import TopDocuments, ranks
from analysis.firings.firings import DocumentFirings
from extract.shards import write_tokens
from extract.stores import TokenDocument, TokenStore
from tests import tiny

NUM_LATENTS = 6


def random_firings(seed: int, num_documents: int) -> list[tuple[int, int, int, float]]:
    """(document, position, latent, value) rows in order of document, position and latent, values with many ties."""
    generator = np.random.default_rng(seed)
    return [
        (document, position, latent, float(generator.integers(1, 5)))
        for document in range(num_documents)
        for position in range(int(generator.integers(0, 6)))
        for latent in range(NUM_LATENTS - 1)
        if generator.random() < 0.4
    ]


def grouped(rows: list[tuple[int, int, int, float]]) -> DocumentFirings:
    columns = [np.array(column) for column in zip(*rows, strict=True)] if rows else [np.empty(0, dtype=int)] * 4
    return DocumentFirings.group(*columns)


def by_full_sort(rows: list[tuple[int, int, int, float]], num: int) -> dict[int, list[tuple[int, float, list]]]:
    documents: dict[tuple[int, int], list] = {}
    for document, position, latent, value in rows:
        documents.setdefault((latent, document), []).append((position, value))
    expected: dict[int, list] = {}
    for (latent, document), tokens in sorted(documents.items(), key=lambda it: (-max(v for _, v in it[1]), it[0][1])):
        expected.setdefault(latent, []).append((document, max(v for _, v in tokens), tokens))
    return {latent: entries[:num] for latent, entries in expected.items()}


def as_dict(top: DocumentFirings) -> dict[int, list[tuple[int, float, list]]]:
    found: dict[int, list] = {}
    for _, group in top.parts(1):
        tokens = list(zip(group.position_n.tolist(), group.value_n.tolist(), strict=True))
        found.setdefault(int(group.latent_g[0]), []).append((group.document_g[0], group.maximum_g[0], tokens))
    return found


@pytest.mark.parametrize("pending", [1, 50, 10**6])
@pytest.mark.parametrize("num", [1, 3, 100])
def test_top_documents_equal_a_full_sort(pending: int, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.examples.top_documents.PENDING_TOKENS", pending)
    rows = random_firings(seed=num, num_documents=40)
    top = TopDocuments(NUM_LATENTS, num)
    for start in range(0, 40, 7):
        top.add(grouped([row for row in rows if start <= row[0] < start + 7]))
    assert as_dict(top.result()) == by_full_sort(rows, num)


def test_the_order_of_the_stream_does_not_matter() -> None:
    rows = random_firings(seed=5, num_documents=30)
    top = TopDocuments(NUM_LATENTS, 3)
    for document in reversed(range(30)):
        top.add(grouped([row for row in rows if row[0] == document]))
        top.result()
    assert as_dict(top.result()) == by_full_sort(rows, 3)


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever stronger documents: each is a candidate when it comes, yet no more than the limit is ever held back."""
    monkeypatch.setattr("analysis.examples.top_documents.PENDING_TOKENS", 10)
    top = TopDocuments(1, 2)
    for document in range(500):
        top.add(grouped([(document, 0, 0, float(document + 1))]))
        assert sum(len(part.position_n) for part, _ in top._parts) <= 2 + 11
    assert as_dict(top.result()) == {0: [(499, 500.0, [(0, 500.0)]), (498, 499.0, [(0, 499.0)])]}


def test_nothing_fires() -> None:
    assert as_dict(TopDocuments(3, 2).result()) == {}


def test_ranks() -> None:
    assert ranks(np.array([5, 5, 5, 8, 8, 9])).tolist() == [0, 1, 2, 0, 1, 0]


def test_select_takes_the_tokens_along() -> None:
    firings = grouped([(0, 0, 0, 1.0), (0, 1, 1, 2.0), (0, 2, 0, 3.0), (1, 0, 1, 4.0)])
    assert as_dict(firings.select(np.array([2, 0]))) == {1: [(1, 4.0, [(0, 4.0)])], 0: [(0, 3.0, [(0, 1.0), (2, 3.0)])]}
    assert as_dict(firings.select(firings.maximum_g == 2.0)) == {1: [(0, 2.0, [(1, 2.0)])]}


def test_the_peak_is_the_first_strongest_token() -> None:
    firings = grouped([(0, 1, 0, 1.0), (0, 4, 0, 3.0), (0, 6, 0, 3.0), (1, 2, 0, 5.0)])
    silent = DocumentFirings.silent(np.array([0]), np.array([2]), np.array([0.0]))
    assert DocumentFirings.concatenate([firings, silent, firings]).peak_g.tolist() == [4, 2, -1, 4, 2]


@pytest.mark.parametrize("text", ["plain words, twice  spaced\n", "日本語とemoji 🙂 mixed", "a \ufffd b", ""])
def test_token_strings_join_to_the_document(text: str) -> None:
    """The tokenizer has one token a byte, so every character outside ASCII is spread over several tokens."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    strings = TokenStrings(tokenizer.decode).split(ids)
    assert len(strings) == len(ids)
    if "\ufffd" not in text:
        assert "".join(strings) == text


def test_a_tokenizer_that_strips_leading_spaces() -> None:
    """As SentencePiece does: a piece that stands alone loses its space, in a sentence it has one."""
    vocabulary = ["▁the", "▁cat", "s"]

    def decode(ids: list[int]) -> str:
        return "".join(vocabulary[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert TokenStrings(decode).split([0, 1, 2]) == [" the", " cat", "s"]


def small_store(folder: Path) -> TokenStore:
    tokenizer, documents = tiny.tokenizer(), []
    for i, text in enumerate(["ab", "cé", "drawn", "unused"]):
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.uint32)
        roles = [("user", 1, 2)] if i == 1 else []
        documents.append(TokenDocument("", f"d{i}", "tests", ids, text, roles=roles, tags={"n": i}))
    write_tokens(folder, documents)
    return TokenStore(folder / "tokens")


def test_examples_as_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, top = small_store(tmp_path), TopDocuments(NUM_LATENTS, 2)
    top.add(grouped([(0, 1, 4, 0.5), (0, 2, 4, 1.5), (1, 1, 4, 2.5), (1, 2, 0, 1 / 3)]))
    silent = DocumentFirings.silent(np.array([4]), np.array([1]), np.array([0.0]))
    parts = [grouped([(0, 1, 4, 0.5), (0, 2, 4, 1.5)]), grouped([(2, 5, 4, 0.25)]), silent]
    kinds = ["activating", "near_miss", "silent"]
    drawn = DrawnSamples(DocumentFirings.concatenate(parts), kinds, np.array([3, -1, -1]))
    path = tmp_path / "examples.sqlite"
    for rows in (100, 2):  # a second writing replaces the first
        monkeypatch.setattr("analysis.examples.database.ROWS", rows)
        write_examples(path, top.result(), drawn, store, tiny.tokenizer().decode)
    with sqlite3.connect(path) as database:
        documents = database.execute("SELECT * FROM documents ORDER BY document").fetchall()
        examples = database.execute("SELECT * FROM examples ORDER BY latent, rank").fetchall()
        samples = database.execute("SELECT * FROM samples ORDER BY latent, kind").fetchall()
        tables = ("examples", "samples")
        plans = [database.execute(f"EXPLAIN QUERY PLAN SELECT * FROM {t} WHERE latent = 4").fetchall() for t in tables]
        read = read_samples(database, 4)
    assert [(*row[:4], json.loads(row[4]), json.loads(row[5])) for row in documents] == [
        (0, "d0", "tests", '{"n": 0}', ["<bos>", "a", "b"], []),
        (1, "d1", "tests", '{"n": 1}', ["<bos>", "c", "", "é"], [["user", 1, 2]]),
        (2, "d2", "tests", '{"n": 2}', ["<bos>", *"drawn"], []),
    ]
    assert [(*row[:4], json.loads(row[4])) for row in examples] == [
        (0, 0, 1, pytest.approx(1 / 3), [[2, 0.333333]]),
        (4, 0, 1, 2.5, [[1, 2.5]]),
        (4, 1, 0, 1.5, [[1, 0.5], [2, 1.5]]),
    ]
    assert samples == [
        (4, "activating", 3, 0, 1.5, "[[1, 0.5], [2, 1.5]]", 2),
        (4, "near_miss", None, 2, 0.25, "[]", 5),
        (4, "silent", None, 1, 0.0, "[]", None),
    ]
    assert [plan[0][3].split()[4] for plan in plans] == ["examples_latent", "samples_latent"]
    assert [(s.kind, s.quantile, s.document, s.max_activation, s.position) for s in read] == [
        (*row[1:5], row[6]) for row in samples
    ]
    assert read[0].activations == {1: 0.5, 2: 1.5} and read[1].tokens == ("<bos>", *"drawn")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["examples.sqlite", "tokens"]


def test_few_rows_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 documents of 5 firing tokens take 1.2 MB; as texts, all at once, they would take 10 MB."""
    monkeypatch.setattr("analysis.examples.database.ROWS", 500)
    number = 20_000
    positions, values = np.tile(np.arange(5), number), np.linspace(0.1, 9, 5 * number, dtype=np.float32)
    document_n = np.repeat(np.arange(number), 5)
    firings = DocumentFirings.adjacent(np.zeros(5 * number, dtype=int), document_n, positions, values)
    drawn = DrawnSamples(firings, ["activating"] * number, np.zeros(number, dtype=int))
    for rows in (_example_rows(firings), _sample_rows(drawn)):
        tracemalloc.start()
        assert sum(1 for _ in rows) == number
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2e6


def test_values_are_printed_with_six_digits() -> None:
    values = np.float32([1 / 3, 0.1, 123.4567, 1234567.0, 1e-5, 2.0, 0.9999999])
    assert significant(values).tolist() == [float(f"{value:.6g}") for value in values.tolist()]
    assert [str(value) for value in significant(values).tolist()][:3] == ["0.333333", "0.1", "123.457"]
