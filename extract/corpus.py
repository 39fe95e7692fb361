"""Documents from JSON Lines, Parquet and Hugging Face datasets.

A record has plain text or a list of chat turns, and may carry `doc_id` and `tags` (a mapping, for evaluation only).
Everything is read as a stream: a corpus need not fit in memory, and reading stops when the tokens suffice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract.config import SourceConfig
from extract.errors import BadInput


@dataclass
class Document:
    """`text`, or `messages` of {"role", "content"}; the other one is None."""

    doc_id: str
    source: str
    text: str | None
    messages: list[dict[str, str]] | None
    tags: dict[str, str] = field(default_factory=dict)


def read_source(source: SourceConfig) -> Iterator[Document]:
    """The documents of one source in their own order, empty ones left out; BadInput with file and line for a record
    that cannot be read.
    """
    name = source_name(source)
    for number, (where, record) in enumerate(_records(source)):
        document = _document(source, name, number, where, record)
        if document.text or document.messages:
            yield document


def source_name(source: SourceConfig) -> str:
    return source.name or Path(source.path).stem


def check_source(source: SourceConfig) -> None:
    """BadInput for a path that leads nowhere, before any model or tokenizer is loaded."""
    if not source.path:
        raise BadInput(
            "corpus.sources has a source without a path. Give corpus=PATH: a .jsonl or .parquet file, a folder, or "
            "a dataset."
        )
    path = Path(source.path)
    if path.exists():
        if path.is_file() and path.suffix not in (".jsonl", ".parquet"):
            raise BadInput(
                f"corpus source {path} is a {path.suffix or 'nameless'} file. Give .jsonl or .parquet, or a folder "
                f"of them."
            )
        if path.is_file() and path.stat().st_size == 0:
            raise BadInput(f"corpus source {path} is empty.")
    elif path.suffix or path.is_absolute() or source.path.count("/") != 1:
        raise BadInput(
            f"corpus source {path} does not exist. Check corpus.sources; `python -m demo` prepares the demo's corpus."
        )


def check_encoding(source: SourceConfig) -> None:
    """BadInput, with file and line, for JSON Lines that are not UTF-8: found in seconds, where tokens take hours."""
    for file in _files(source):
        if file.suffix == ".jsonl":
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    _decoded(line, f"{file}, line {number}")


def _files(source: SourceConfig) -> list[Path]:
    """The local files of a source; none for a dataset."""
    path = Path(source.path)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet"))
    return [path] if path.exists() else []


def _records(source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) pairs; `where` names file and line for error messages."""
    files = _files(source)
    if not files:
        yield from _dataset_records(source)
    for file in files:
        yield from _jsonl_records(file) if file.suffix == ".jsonl" else _parquet_records(file)


def _jsonl_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise BadInput(f"{where} is not JSON ({error.msg}). Each line must be one JSON object.") from error
            if not isinstance(record, dict):
                raise BadInput(
                    f'{where} is not a JSON object. Write {{"text": ...}} or {{"messages": [...]}} on each line.'
                )
            yield where, record


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}). Convert the file, for example with iconv."
        ) from error


def _parquet_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        for record in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", record


def _dataset_records(source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        records: Iterable[Any] = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
    except Exception as error:  # the library raises many kinds, from connection errors to its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"corpus source {source.path} is neither a file nor a dataset that could be opened ({first}). "
            "Check the name; a gated dataset needs its terms accepted and HF_TOKEN set."
        ) from error
    for number, record in enumerate(records, 1):
        yield f"{source.path}, row {number}", record


def _document(source: SourceConfig, name: str, number: int, where: str, record: dict[str, Any]) -> Document:
    text, messages = record.get(source.text_field), record.get(source.messages_field)
    if text is None and messages is None:
        raise BadInput(
            f"{where} has neither {source.text_field!r} nor {source.messages_field!r}, but {sorted(record)}. "
            "Set text_field or messages_field of the source."
        )
    if messages is not None:
        messages, text = [_turn(where, turn) for turn in messages], None
    elif not isinstance(text, str):
        raise BadInput(f"{where}: {source.text_field!r} is {type(text).__name__}, not text.")
    return Document(str(record.get("doc_id", f"{name}/{number}")), name, text, messages, record.get("tags") or {})


def _turn(where: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise BadInput(f'{where}: a chat turn must be {{"role": ..., "content": ...}}, not {turn!r:.80}.')
    return {"role": turn["role"], "content": turn["content"]}
