"""Documents of a source: what a record says, in an order that the seed decides.

A record has plain text or a list of chat turns, and may carry a name, a language and `tags` (a mapping, for evaluation
only).
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from extract.chat import ChatRenderer
from extract.config import CorpusConfig, SourceConfig
from extract.errors import BadInput
from extract.records import SUFFIXES, Record, is_local, read_records, visible_files
from extract.stores import content_sha256

FIRST_DOCUMENTS = 1000
FILE_SUFFIXES = (*SUFFIXES, ".json", ".zst", ".gz", ".txt", ".csv")


@dataclass
class Document:
    """`text`, or `messages` of {"role", "content"}; the other one is None. `language` is read only for a filter.

    A record whose text is none, or whose turns are none (content that is null or a list of parts, say), has neither:
    `malformed` says where and what.
    """

    doc_id: str
    source: str
    text: str | None
    messages: list[dict[str, str]] | None
    tags: dict[str, str] = field(default_factory=dict)
    language: str | None = None
    malformed: str = ""

    @property
    def is_empty(self) -> bool:
        """Nothing but white space."""
        contents = [self.text or ""] if self.messages is None else [turn["content"] for turn in self.messages]
        return not any(content.strip() for content in contents)

    @property
    def content_sha256(self) -> str:
        return content_sha256(self.text or "", self.messages, np.empty(0))


def read_source(source: SourceConfig, start: int = 0, seed: int = 0, window: int = 0) -> Iterator[Document]:
    """The documents of one source from number `start` on, in an order that is a pure function of the other arguments.

    Without `window` it is the order of the files. With one, the files come in random order and documents
    w * window ... (w + 1) * window - 1 of it are permuted among themselves, for every w: a document moves by less than
    two windows, and any position is reached without keeping what came before.

    Raises:
        BadInput: with file and line, for a record that cannot be read or has neither field.
    """
    if not window:
        yield from _documents(source, start, None)
        return
    own_seed = _own_seed(seed, source_name(source))
    skipped = start % window
    documents = _documents(source, start - skipped, own_seed)
    for number in itertools.count(start // window):
        drawn = list(itertools.islice(documents, window))
        order = np.random.default_rng([own_seed, number]).permutation(len(drawn))
        yield from (drawn[i] for i in order[skipped:])
        skipped = 0
        if len(drawn) < window:
            return


def _own_seed(seed: int, name: str) -> int:
    """A source's order does not change when another source joins it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


def source_name(source: SourceConfig) -> str:
    return source.name or Path(source.path).name.removesuffix(".zst").rsplit(".", 1)[0]


def check_sources(corpus: CorpusConfig) -> None:
    """BadInput for paths that lead nowhere and names used twice, before any model or tokenizer is loaded."""
    if not corpus.sources:
        raise BadInput(
            "corpus has no sources. Give corpus=PATH: a .jsonl, .jsonl.zst or .parquet file, a folder of them, or a "
            "dataset's name."
        )
    for source in corpus.sources:
        check_source(source)
    name, count = Counter(map(source_name, corpus.sources)).most_common(1)[0]
    if count > 1:
        raise BadInput(f"corpus.sources: {count} sources are named {name!r}. Give each a name=NAME of its own.")


def check_source(source: SourceConfig) -> None:
    """BadInput for a path that leads nowhere."""
    if not source.path:
        raise BadInput(
            "corpus.sources has a source without a path. Give corpus=PATH: a .jsonl, .jsonl.zst or .parquet file, a "
            "folder, or a dataset."
        )
    path = Path(source.path)
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise BadInput(
            f"corpus source {path} is a {path.suffix or 'nameless'} file. Give {', '.join(SUFFIXES)}, or a folder of "
            f"them."
        )
    if path.is_file() and path.stat().st_size == 0 or path.is_dir() and not visible_files(path):
        raise BadInput(f"corpus source {path} is empty.")
    is_file_name = path.name.endswith(FILE_SUFFIXES)  # the name of a dataset may hold a dot: org/data-1.0
    if not path.exists() and (is_file_name or path.is_absolute() or source.path.count("/") != 1):
        raise BadInput(
            f"corpus source {path} does not exist. Check corpus.sources; `python -m demo` prepares the demo's corpus."
        )


def check_first_documents(source: SourceConfig, tokenizer: Any) -> None:
    """BadInput for what the first documents show: a field that is not there or holds neither text nor turns, a chat
    without a template that works, a language that does not occur.
    """
    documents = list(itertools.islice(read_source(source), FIRST_DOCUMENTS))
    if not documents:
        raise BadInput(f"corpus source {source.path} holds no document. Check the file.")
    if all(document.malformed for document in documents):
        raise BadInput(
            f"corpus source {source.path}: {documents[0].malformed} So are all of the first {len(documents)} records. "
            f"Set text_field or messages_field of the source."
        )
    if any(document.messages for document in documents):
        ChatRenderer(tokenizer)  # refuses a template that is missing or does not work
    languages = Counter(document.language for document in documents)
    if source.languages and not any(language in languages for language in source.languages):
        there = ", ".join(str(language) for language, _ in languages.most_common(10))
        raise BadInput(
            f"corpus source {source.path}: none of languages={source.languages} occurs in the first {len(documents)} "
            f"records; there are: {there}. Write them as the field {source.language_field!r} does."
        )


def _documents(source: SourceConfig, start: int, seed: int | None) -> Iterator[Document]:
    name = source_name(source)
    for number, (where, record) in enumerate(read_records(source, start, seed), start):
        yield _document(source, f"{name}/{number}", name, where, record)


def _document(source: SourceConfig, default_id: str, name: str, where: str, record: Record) -> Document:
    text, messages = record.get(source.text_field), record.get(source.messages_field)
    if source.text_field not in record and source.messages_field not in record:
        raise BadInput(
            f"{where} has neither {source.text_field!r} nor {source.messages_field!r}, but {sorted(record)}. "
            "Set text_field or messages_field of the source."
        )
    fault = _fault(source, text, messages)
    if fault:
        text = messages = None
        fault = f"{_within(source, where)}: {fault}."
    elif messages is not None:
        messages, text = [{"role": turn["role"], "content": turn["content"]} for turn in messages], None
    doc_id = record.get(source.id_field)
    doc_id = default_id if doc_id is None else str(doc_id)
    return Document(doc_id, name, text, messages, _tags(record), _language(source, where, record), fault)


def _within(source: SourceConfig, where: str) -> str:
    """A place within a source, wherever that lies: tokens keep it, and have the same bytes when they are made again."""
    return where.removeprefix(f"{Path(source.path).parent}/") if is_local(source) else where


def _fault(source: SourceConfig, text: Any, messages: Any) -> str:
    """Why a record is neither text nor turns of text, or nothing; messages go before text."""
    if messages is None:
        is_text = text is None or isinstance(text, str)
        return "" if is_text else f"{source.text_field!r} is {type(text).__name__}, not text"
    if not isinstance(messages, list):
        return f"a chat must be a list of turns, not {messages!r:.80}"
    wrong = [turn for turn in messages if not _is_turn(turn)]
    return f'a chat turn must be {{"role": text, "content": text}}, not {wrong[0]!r:.80}' if wrong else ""


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _tags(record: Record) -> dict[str, str]:
    """The record's tags if they are a mapping (a dataset may have a list of that name), without the nulls that Parquet
    fills it up with.
    """
    tags = record.get("tags")
    return {tag: value for tag, value in tags.items() if value is not None} if isinstance(tags, dict) else {}


def _language(source: SourceConfig, where: str, record: Record) -> str | None:
    if not source.languages:
        return None
    if source.language_field not in record:
        raise BadInput(
            f"{where} has no field {source.language_field!r} to compare with languages={source.languages}, but "
            f"{sorted(record)}. Set language_field of the source, or leave languages out."
        )
    return record[source.language_field]
