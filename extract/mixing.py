"""Sources mixed by token share, filtered and counted, from any point on that an earlier run reached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from extract.config import CorpusConfig, SourceConfig
from extract.corpus import Document, read_source, source_name
from extract.encoding import Encoder, cut
from extract.errors import BadInput
from extract.stores import TokenDocument

BATCH_DOCUMENTS = 256


@dataclass
class SourceState:
    """What has been taken of one source: how many records were `read`, how many documents `kept`, with how many tokens,
    how many of them `truncated` to the context, how many were left out for which reason (the fields after it), the
    `first_malformed` of them, and a `digest` of all that was read, in its order.
    """

    read: int = 0
    kept: int = 0
    tokens: int = 0
    truncated: int = 0
    malformed: int = 0
    empty: int = 0
    other_language: int = 0
    refused: int = 0
    too_short: int = 0
    too_long: int = 0
    duplicate: int = 0
    first_malformed: str = ""
    digest: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """The numbers; what is zero left out."""
        return {name: value for name, value in asdict(self).items() if value and isinstance(value, int)}

    def __str__(self) -> str:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in self.counts.items()) or "0 read"
        return f"{counts}; first malformed: {self.first_malformed}" if self.first_malformed else counts


class Outcome(NamedTuple):
    """What became of a record: a document to keep, or None and the field of `SourceState` that counts it."""

    read: Document
    kept: TokenDocument | None
    left_out: str = ""
    is_truncated: bool = False


class Mixture:
    """Documents of all sources, interleaved so that their shares of the tokens are kept at every point.

    The next document comes from the source with the smallest (tokens taken) / share. With `num_tokens` each source
    gives exactly its share of them, the last document cut to fit; without, every document comes once. Order and content
    are a pure function of the corpus, the tokenizer and the seed; `states` and `seen` continue an earlier mixture.
    """

    def __init__(
        self,
        corpus: CorpusConfig,
        tokenizer: Any,
        seed: int = 0,
        states: list[SourceState] | None = None,
        seen: set[bytes] | None = None,
    ):
        self.corpus = corpus
        self.states = states or [SourceState() for _ in corpus.sources]
        self._seen = set() if seen is None else seen
        self._encoder = Encoder(tokenizer)
        self._budgets = token_budgets(corpus)
        self._streams = [
            outcomes(corpus, source, self._encoder, seed, state.read)
            for source, state in zip(corpus.sources, self.states, strict=True)
        ]

    def __iter__(self) -> Iterator[TokenDocument]:
        """Each document once it is counted: `states` are always those after the document that was given last.

        Raises:
            BadInput: a source that holds less than its share, or nothing.
        """
        open_sources = [i for i in range(len(self.states)) if self._left(i) != 0]
        while open_sources:
            i = min(open_sources, key=lambda j: self.states[j].tokens / self.corpus.sources[j].share)
            document = self._draw(i)
            if document is None:
                self._check_exhausted(i)
            if document is None or self._left(i) == 0:
                open_sources.remove(i)
            if document is not None:
                yield document

    def _draw(self, i: int) -> TokenDocument | None:
        """The next document of source `i`, or None at its end."""
        state = self.states[i]
        for read, document, left_out, is_truncated in self._streams[i]:
            state.read += 1
            state.digest = extended(state.digest, read)
            state.first_malformed = state.first_malformed or read.malformed
            if document is not None and self._is_duplicate(document):
                document, left_out = None, "duplicate"
            if document is not None:
                document = cut(document, min(len(document.token_ids), self._left(i) or len(document.token_ids)))
                state.kept += 1
                state.tokens += len(document.token_ids)
                state.truncated += is_truncated
                return document
            setattr(state, left_out, getattr(state, left_out) + 1)
        return None

    def _is_duplicate(self, document: TokenDocument) -> bool:
        if not self.corpus.deduplicate:
            return False
        digest = content_digest(document.content_sha256)
        is_duplicate = digest in self._seen
        self._seen.add(digest)
        return is_duplicate

    def _left(self, i: int) -> int | None:
        """Tokens that source `i` still has to give; None without a budget."""
        budget = self._budgets[i]
        return None if budget is None else budget - self.states[i].tokens

    def _check_exhausted(self, i: int) -> None:
        state, name = self.states[i], source_name(self.corpus.sources[i])
        refusal = self._encoder.renderer.first_refusal if state.refused else None
        counts = f"{state}; first chat refused: {refusal}" if refusal else str(state)
        if self._budgets[i] is not None:
            raise BadInput(
                f"corpus source {name} holds {state.tokens} tokens; its share of "
                f"corpus.num_tokens={self.corpus.num_tokens} is {self._budgets[i]} ({counts}). "
                "Lower num_tokens or its share, or set num_tokens=null."
            )
        if not state.tokens:
            raise BadInput(
                f"corpus source {self.corpus.sources[i].path} holds no document that could be kept, of "
                f"corpus.min_tokens={self.corpus.min_tokens} or more tokens ({counts}). Check the file and the filters."
            )


def extended(digest: str, document: Document) -> str:
    """The digest of a sequence of documents and one more."""
    parts = (digest, document.doc_id, document.content_sha256, document.language, document.tags)
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(corpus: CorpusConfig, source: SourceConfig, seed: int, count: int) -> str:
    """The `SourceState.digest` that the first `count` documents of a source give now."""
    return reduce(extended, islice(read_source(source, 0, seed, corpus.shuffle_buffer), count), "")


def content_digest(content_sha256: str) -> bytes:
    """Half of the content's hash, to save memory: two of 10^9 documents share one with a probability of 10^-21."""
    return bytes.fromhex(content_sha256[:32])


def token_budgets(corpus: CorpusConfig) -> list[int | None]:
    """Tokens of each source, summing to num_tokens exactly: cumulative shares are rounded, not each share."""
    if corpus.num_tokens is None:
        return [None] * len(corpus.sources)
    cumulative = np.cumsum([source.share for source in corpus.sources])
    edges = np.rint(cumulative / cumulative[-1] * corpus.num_tokens).astype(int)
    return [int(budget) for budget in np.diff(edges, prepend=0)]


def outcomes(corpus: CorpusConfig, source: SourceConfig, encoder: Encoder, seed: int, start: int) -> Iterator[Outcome]:
    """One outcome for every record of a source from record `start` on; documents are cut to `context_length`."""
    documents = read_source(source, start, seed, corpus.shuffle_buffer)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        reasons = [_left_out(document, source) for document in batch]
        wanted = [document for document, reason in zip(batch, reasons, strict=True) if not reason]
        encoded = iter(encoder.encode(wanted))
        for document, reason in zip(batch, reasons, strict=True):
            yield Outcome(document, None, reason) if reason else _outcome(document, next(encoded), corpus)


def _left_out(document: Document, source: SourceConfig) -> str:
    if document.malformed:
        return "malformed"
    if document.is_empty:
        return "empty"
    return "other_language" if source.languages and document.language not in source.languages else ""


def _outcome(read: Document, encoded: TokenDocument | None, corpus: CorpusConfig) -> Outcome:
    if encoded is None:
        return Outcome(read, None, "refused")
    length = len(encoded.token_ids)
    if length < corpus.min_tokens:
        return Outcome(read, None, "too_short")
    if corpus.max_tokens is not None and length > corpus.max_tokens:
        return Outcome(read, None, "too_long")
    return Outcome(read, cut(encoded, corpus.context_length), is_truncated=length > corpus.context_length)
