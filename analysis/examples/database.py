"""`examples.sqlite`: the top documents of every latent with the activations of their firing tokens, and documents drawn
to test descriptions; writing and reading it.

Shapes: n firing (document, position, latent) triples; g groups of them, one per (latent, document) pair.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import fsync
from pathlib import Path

import numpy as np

from analysis.damage import damaged
from analysis.examples.samples import NEAR_MISS, DrawnSamples
from analysis.examples.top_documents import ranks
from analysis.firings.firings import DocumentFirings
from analysis.json_lines import json_text
from extract.errors import BadInput
from extract.publish import naming, rename
from extract.stores import TokenStore

EXAMPLES = "examples.sqlite"
# A character of UTF-8 has at most this many bytes, and so at most this many tokens.
MAX_TOKENS_PER_CHARACTER = 4
# Rows that exist as Python objects at a time: of ten firing tokens each, 85 MB.
ROWS = 2**16
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

SCHEMA = """
CREATE TABLE documents(
    document INTEGER PRIMARY KEY, doc_id TEXT, source TEXT, tags TEXT, text_tokens TEXT, roles TEXT);
CREATE TABLE examples(latent INTEGER, rank INTEGER, document INTEGER, max_activation REAL, activations TEXT);
CREATE TABLE samples(
    latent INTEGER, kind TEXT, quantile INTEGER, document INTEGER, max_activation REAL, activations TEXT,
    position INTEGER);
"""


def write_examples(
    path: Path, top: DocumentFirings, drawn: DrawnSamples, tokens: TokenStore, decode: Callable[[list[int]], str]
) -> None:
    """Publishes top documents and samples as a SQLite file; `decode` is the tokenizer's, without clean-up.

    documents(document, doc_id, source, tags, text_tokens, roles)   of all that is named below: tags a JSON object,
                                                                    text_tokens an array of strings, roles an array of
                                                                    [role, start, end] of its tokens, end excluded
    examples(latent, rank, document, max_activation, activations)   activations [[position, value], ...]; rank from 0
    samples(latent, kind, quantile, document, max_activation, activations, position)        see `Sample`
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = TokenStrings(decode)
    numbers = np.unique(np.concatenate([top.document_g, drawn.firings.document_g])).tolist()
    with naming(path):
        connection = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA} BEGIN")
            documents = (_document_row(i, tokens, pieces) for i in numbers)
            connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", documents)
            connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?)", _example_rows(top))
            connection.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)", _sample_rows(drawn))
            connection.execute("CREATE INDEX examples_latent ON examples(latent, rank)")
            connection.execute("CREATE INDEX samples_latent ON samples(latent, kind)")
            connection.execute("COMMIT")
        finally:
            connection.close()
        with partial.open("rb") as file:
            fsync(file.fileno())
        rename(partial, path)


def _document_row(document: int, tokens: TokenStore, pieces: TokenStrings) -> tuple[int, str, str, str, str, str]:
    found = tokens.document(document)
    strings = pieces.split(found.token_ids.tolist())
    return document, found.doc_id, found.source, json_text(found.tags), json_text(strings), json_text(found.roles)


def _example_rows(top: DocumentFirings) -> Iterator[tuple[int, int, int, float, str]]:
    rank_g = ranks(top.latent_g)
    for groups, part in top.parts(ROWS):
        columns = (part.latent_g, rank_g[groups], part.document_g, part.maximum_g)
        yield from zip(*(column.tolist() for column in columns), _activations(part), strict=True)


def _sample_rows(drawn: DrawnSamples) -> Iterator[tuple[int, str, int | None, int, float, str, int | None]]:
    for groups, part in drawn.firings.parts(ROWS):
        kinds, quantile_g = drawn.kind_g[groups], drawn.quantile_g[groups]
        quantiles = [None if quantile < 0 else quantile for quantile in quantile_g.tolist()]
        peaks = [None if position < 0 else position for position in part.peak_g.tolist()]
        latents, documents, maxima = (column.tolist() for column in (part.latent_g, part.document_g, part.maximum_g))
        # The token of a near miss does not fire.
        texts = ("[]" if kind == NEAR_MISS else text for kind, text in zip(kinds, _activations(part), strict=True))
        yield from zip(latents, kinds, quantiles, documents, maxima, texts, peaks, strict=True)


def _activations(firings: DocumentFirings) -> Iterator[str]:
    """[[position, value], ...] of every group, as JSON."""
    pairs = zip(firings.position_n.tolist(), significant(firings.value_n).tolist(), strict=True)
    texts = [f"[{position}, {value!r}]" for position, value in pairs]  # in a third of the time of the module json
    ends = firings.length_g.cumsum(dtype=np.int64)
    for start, end in zip((ends - firings.length_g).tolist(), ends.tolist(), strict=True):
        yield f"[{', '.join(texts[start:end])}]"


def significant(value_n: np.ndarray) -> np.ndarray:
    """Positive values rounded to six digits, which is what float32 holds; more would double the file. float64."""
    value_n = value_n.astype(np.float64)
    # A whole number, divided by a power of ten that is exact, is the float nearest to the decimal: it prints as such.
    power_n = 10.0 ** (5 - np.floor(np.log10(value_n)))
    return np.rint(value_n * power_n) / power_n


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
            known = self._known.get((token_ids[start],))
            if known is not None and REPLACEMENT not in known:
                strings.append(known)
                continue
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


@dataclass(frozen=True)
class Sample(Example):
    """A document drawn at random for a latent, to test a description of it.

    `kind`: "activating", it fires there: `quantile` is the stratum of its maximum, 0 the weakest;
    "silent", it fires nowhere in it; "near_miss", neither, but its largest pre-activation there, `max_activation` at
    `position`, is among the highest that stay below the threshold. `activations` are of firing tokens, so those two
    have none; `position` is None for silent ones, and that of the strongest token for activating ones.
    """

    kind: str
    quantile: int | None
    max_activation: float
    position: int | None = None


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """The examples of an analysis folder, to be read only, whatever characters its path holds. BadInput, also from
    within, once SQLite finds the file damaged.
    """
    path = folder / EXAMPLES
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        try:
            yield database
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise damaged(path, error) from error
            raise


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


def has_samples(database: sqlite3.Connection) -> bool:
    """Whether documents were drawn for latents, and in this form; earlier versions drew none."""
    return bool(database.execute("SELECT 1 FROM pragma_table_info('samples') WHERE name = 'position'").fetchone())


def check_samples(database: sqlite3.Connection, folder: Path) -> None:
    """BadInput where the analysis is from before samples were stored with their places."""
    if not has_samples(database):
        raise BadInput(
            f"{folder / EXAMPLES} holds no samples to score descriptions with: it is of an earlier version. "
            f"Delete {folder / 'latents.json'} and run the analysis again."
        )


def read_samples(database: sqlite3.Connection, latent: int) -> list[Sample]:
    """The documents drawn for a latent: activating ones by quantile, then near misses, then silent ones."""
    rows = database.execute(
        "SELECT document, text_tokens, activations, kind, quantile, max_activation, position FROM samples "
        "JOIN documents USING (document) WHERE latent = ? ORDER BY kind, quantile, document",
        (latent,),
    )
    return [
        Sample(document, tuple(json.loads(tokens)), {int(i): value for i, value in json.loads(fired)}, *rest)
        for document, tokens, fired, *rest in rows
    ]
