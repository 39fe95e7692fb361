"""The exact top documents of every latent with the activations of their firing tokens: one stream, bounded
memory; and reading them back.

Shapes: n firing (document, position, latent) triples; g groups of them, one per (latent, document) pair.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import fsync
from pathlib import Path

import numpy as np

from extract.publish import naming, rename
from extract.stores import TokenStore

# Firing tokens held back before candidates are sorted; about 40 bytes each, besides the top documents themselves.
PENDING_TOKENS = 2**22
# A character of UTF-8 has at most this many bytes, and so at most this many tokens.
MAX_TOKENS_PER_CHARACTER = 4
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

SCHEMA = """
CREATE TABLE documents(document INTEGER PRIMARY KEY, doc_id TEXT, source TEXT, tags TEXT, text_tokens TEXT);
CREATE TABLE examples(latent INTEGER, rank INTEGER, document INTEGER, max_activation REAL, activations TEXT);
"""


@dataclass(frozen=True)
class DocumentFirings:
    """What latents do in documents: the maximum (g,), and positions and values (n,) of the `length_g` firing tokens."""

    latent_g: np.ndarray
    document_g: np.ndarray
    maximum_g: np.ndarray
    length_g: np.ndarray
    position_n: np.ndarray
    value_n: np.ndarray

    @classmethod
    def group(
        cls, document_n: np.ndarray, position_n: np.ndarray, latent_n: np.ndarray, value_n: np.ndarray
    ) -> DocumentFirings:
        """Groups firing tokens (in order of position within a document) of whole documents by latent, then document."""
        order_n = np.lexsort((document_n, latent_n))
        document_n, latent_n, value_n = document_n[order_n], latent_n[order_n], value_n[order_n]
        changes = (np.diff(latent_n) != 0) | (np.diff(document_n) != 0)
        start_g = np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(latent_n)]
        length_g = np.diff(np.append(start_g, len(latent_n)))
        maximum_g = np.maximum.reduceat(value_n, start_g) if len(start_g) else value_n
        return cls(latent_n[start_g], document_n[start_g], maximum_g, length_g, position_n[order_n], value_n)

    @classmethod
    def concatenate(cls, parts: list[DocumentFirings]) -> DocumentFirings:
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part._arrays() for part in parts), strict=True)))

    def select(self, index_g: np.ndarray) -> DocumentFirings:
        """The groups that a mask or an index picks, with their tokens."""
        start_g, length_g = (self.length_g.cumsum() - self.length_g)[index_g], self.length_g[index_g]
        shift_g = start_g - (length_g.cumsum() - length_g)
        index_n = np.repeat(shift_g, length_g) + np.arange(length_g.sum())
        groups = (self.latent_g[index_g], self.document_g[index_g], self.maximum_g[index_g], length_g)
        return DocumentFirings(*groups, self.position_n[index_n], self.value_n[index_n])

    def tokens(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, values) of every group."""
        end_g = self.length_g.cumsum()
        for start, end in zip(end_g - self.length_g, end_g, strict=True):
            yield self.position_n[start:end], self.value_n[start:end]

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.latent_g, self.document_g, self.maximum_g, self.length_g, self.position_n, self.value_n


class TopDocuments:
    """The `num_documents` documents with the highest maximum of every latent; ties go to the lower document number.

    Candidates pile up until they outweigh what is already kept, then one sort keeps the best; a document below the
    last of a full list is never a candidate. So memory is bounded by the result, and the result by
    num_latents * num_documents documents' firing tokens.
    """

    def __init__(self, num_latents: int, num_documents: int) -> None:
        self._num_documents = num_documents
        self._floor_L = np.full(num_latents, -np.inf)
        self._parts: list[DocumentFirings] = []
        self._kept_tokens = self._pending_tokens = 0

    def add(self, firings: DocumentFirings) -> None:
        """Adds whole documents, each (latent, document) pair at most once over all calls."""
        candidates = firings.select(firings.maximum_g >= self._floor_L[firings.latent_g])
        self._parts.append(candidates)
        self._pending_tokens += len(candidates.position_n)
        if self._pending_tokens > max(PENDING_TOKENS, self._kept_tokens):
            self._compact()

    def result(self) -> DocumentFirings:
        """The top documents, sorted by latent and rank."""
        self._compact()
        return self._parts[0]

    def _compact(self) -> None:
        nothing = np.empty(0, dtype=np.int64)
        candidates = DocumentFirings.concatenate(self._parts or [DocumentFirings.group(*[nothing] * 4)])
        order_g = np.lexsort((candidates.document_g, -candidates.maximum_g, candidates.latent_g))
        rank_g = ranks(candidates.latent_g[order_g])
        best = candidates.select(order_g[rank_g < self._num_documents])
        last_g = ranks(best.latent_g) == self._num_documents - 1
        self._floor_L[best.latent_g[last_g]] = best.maximum_g[last_g]
        self._parts, self._kept_tokens, self._pending_tokens = [best], len(best.position_n), 0


def ranks(sorted_g: np.ndarray) -> np.ndarray:
    """Position of every entry within its run of equal entries: [5, 5, 5, 8, 8] -> [0, 1, 2, 0, 1]."""
    start_g = np.searchsorted(sorted_g, sorted_g, side="left")
    return np.arange(len(sorted_g)) - start_g


def write_examples(path: Path, top: DocumentFirings, tokens: TokenStore, decode: Callable[[list[int]], str]) -> None:
    """Publishes the top documents as a SQLite file; `decode` is the tokenizer's, without clean-up.

    documents(document, doc_id, source, tags, text_tokens)          tags a JSON object, text_tokens an array of strings
    examples(latent, rank, document, max_activation, activations)   activations [[position, value], ...]; rank from 0
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    pieces = TokenStrings(decode)
    with naming(path):
        connection = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA} BEGIN")
            documents = (_document_row(i, tokens, pieces) for i in np.unique(top.document_g).tolist())
            connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", documents)
            connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?)", _example_rows(top))
            connection.execute("CREATE INDEX examples_latent ON examples(latent, rank)")
            connection.execute("COMMIT")
        finally:
            connection.close()
        with partial.open("rb") as file:
            fsync(file.fileno())
        rename(partial, path)


def _document_row(document: int, tokens: TokenStore, pieces: TokenStrings) -> tuple[int, str, str, str, str]:
    found = tokens.document(document)
    strings = pieces.split(found.token_ids.tolist())
    return document, found.doc_id, found.source, _json(found.tags), _json(strings)


def _json(value: object) -> str:
    """JSON that any UTF-8 file can hold: text with lone surrogates is escaped instead of refused."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if any("\ud800" <= character <= "\udfff" for character in text) else text


def _example_rows(top: DocumentFirings) -> Iterator[tuple[int, int, int, float, str]]:
    columns = (top.latent_g, ranks(top.latent_g), top.document_g, top.maximum_g)
    groups = zip(*(column.tolist() for column in columns), top.tokens(), strict=True)
    for latent, rank, document, maximum, (positions, values) in groups:
        # Six digits are what float32 holds; more would double the file.
        rounded = [float(f"{value:.6g}") for value in values.tolist()]
        yield latent, rank, document, maximum, json.dumps(list(zip(positions.tolist(), rounded, strict=True)))


class TokenStrings:
    """The text of every token of a document, so that joining them gives the document back.

    A character that is spread over several tokens belongs to the last of them; the others are empty.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._known: dict[tuple[int, ...], str] = {}

    def split(self, token_ids: list[int]) -> list[str]:
        strings: list[str] = []
        while len(strings) < len(token_ids):
            start = len(strings)
            piece, length = self._whole_characters(token_ids[start : start + MAX_TOKENS_PER_CHARACTER])
            strings += [""] * (length - 1) + [piece]
        return strings

    def _whole_characters(self, token_ids: list[int]) -> tuple[str, int]:
        """The shortest run of tokens from the first on that decodes to whole characters, and its length."""
        for length in range(1, len(token_ids) + 1):
            piece = self._text(tuple(token_ids[:length]))
            if REPLACEMENT not in piece:
                return piece, length
        return self._text((token_ids[0],)), 1

    def _text(self, token_ids: tuple[int, ...]) -> str:
        if token_ids not in self._known:
            # Tokenizers may strip the space of what stands first; a second copy behind it keeps its own.
            once, twice = self._decode([*token_ids]), self._decode([*token_ids, *token_ids])
            self._known[token_ids] = twice[len(once) :] if twice.startswith(once) else once
        return self._known[token_ids]


@dataclass(frozen=True)
class Example:
    """A top document of a latent. `activations` holds the value of every firing token by its position."""

    document: int
    tokens: tuple[str, ...]
    activations: Mapping[int, float]

    @property
    def peak(self) -> int:
        """Position of the strongest activation."""
        return max(self.activations, key=lambda position: self.activations[position])


def all_documents(database: sqlite3.Connection) -> Iterator[list[str]]:
    """Token strings of every stored document."""
    for (tokens,) in database.execute("SELECT text_tokens FROM documents ORDER BY document"):
        yield json.loads(tokens)


def read_examples(database: sqlite3.Connection, latent: int, limit: int) -> list[Example]:
    """The `limit` top documents of a latent, strongest first."""
    rows = database.execute(
        "SELECT document, text_tokens, activations FROM examples JOIN documents USING (document) "
        "WHERE latent = ? ORDER BY rank LIMIT ?",
        (latent, limit),
    )
    return [
        Example(document, tuple(json.loads(tokens)), {int(position): value for position, value in json.loads(fired)})
        for document, tokens, fired in rows
    ]
