"""Records of local files and Hugging Face datasets, read as a stream from any record on.

Whole files are never held in memory, reading stops when the tokens suffice, and records before the first wanted one are
passed over as cheaply as their format allows.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from extract.config import SourceConfig
from extract.errors import BadInput

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
CHECKED_BYTES = 256 << 20
PARQUET_BATCH = 256
# How the names of files and folders begin that belong to a split, as the datasets library reads them.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}

Record = dict[str, Any]


def read_records(source: SourceConfig, start: int = 0, seed: int | None = None) -> Iterator[tuple[str, Record]]:
    """(where, record) pairs from record `start` on; `where` names file and line for error messages.

    With a `seed` the files (of a dataset: its parts) are read in the order that it decides, else in that of their
    names. The same arguments give the same records.

    Raises:
        BadInput: a record, file or dataset that cannot be read.
    """
    files = local_files(source)
    if not files:
        yield from _dataset_records(source, start, seed)
    if seed is not None:
        files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    for file in files:
        if start and (held := _num_records(file)) <= start:
            start -= held
            continue
        yield from _parquet_records(file, start) if file.suffix == ".parquet" else _json_records(file, start)
        start = 0


def local_files(source: SourceConfig) -> list[Path]:
    """The JSON Lines and Parquet files of a source and its split by name; none for what the datasets library loads, as
    it does a folder without a file of the split: its error shows the splits that there are.
    """
    path = Path(source.path)
    if not path.is_dir():
        return [path] if path.exists() else []
    if source.subset is not None or any((path / name).exists() for name in SAVED):
        return []
    return [file for file in record_files(path) if split_of(path_within(source, file)) in _names_of(source.split)]


def record_files(folder: Path) -> list[Path]:
    """The JSON Lines and Parquet files of a folder by name, of whatever split."""
    return [file for file in visible_files(folder) if file.name.endswith(SUFFIXES)]


def other_splits(source: SourceConfig) -> list[str]:
    """The splits whose files lie beside those of a local source and are not read."""
    path, read = Path(source.path), local_files(source)
    files = record_files(path) if path.is_dir() and read else []
    return sorted({split_of(path_within(source, file)) for file in files if file not in read})


def path_within(source: SourceConfig, file: Path) -> Path:
    """What names a local file wherever its source lies: its path within the folder, or its own name."""
    path = Path(source.path)
    return file.relative_to(path) if path.is_dir() else Path(file.name)


def split_of(path: Path) -> str:
    """The split that a file within a folder belongs to: SPLIT of SPLIT-00000-of-00003.parquet where it begins with a
    split's word, else the split whose word its name, or that of the nearest folder above it, begins with; train if none
    does.
    """
    for part in reversed(path.parts):
        word = re.match(r"[a-z]*", part)[0]  # type: ignore[index]
        split = next((split for split, words in SPLIT_WORDS.items() if word in words), None)
        if split:
            numbered = re.match(r"(\w+)-\d{5}-of-\d{5}", part)
            return numbered[1] if numbered else split
    return "train"


def _names_of(split: str) -> tuple[str, ...]:
    """A split and, for `val`, say, the name that `split_of` gives it."""
    return (split, *(name for name, words in SPLIT_WORDS.items() if split in words))


def visible_files(folder: Path) -> list[Path]:
    """The files beneath a folder by name, without hidden ones (a download's own records, say)."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))


def check_encoding(source: SourceConfig) -> None:
    """BadInput, with file and line, for JSON Lines that are not UTF-8, found in a second where tokens take hours.

    Only the first `CHECKED_BYTES` of a source are looked at. What lies behind them is found when it is read, and the
    shards finished until then are kept.
    """
    left = CHECKED_BYTES
    for file in local_files(source):
        if file.suffix != ".parquet":
            for where, line in _lines(file):
                _decoded(line, where)
                if (left := left - len(line)) < 0:
                    return


def _json_records(file: Path, start: int) -> Iterator[tuple[str, Record]]:
    for where, line in itertools.islice(_lines(file), start, None):
        text = _decoded(line, where)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where} is not JSON ({error.msg}). Each line must be one JSON object.") from error
        if not isinstance(record, dict):
            raise BadInput(
                f'{where} is not a JSON object. Write {{"text": ...}} or {{"messages": [...]}} on each line.'
            )
        if "\\u" in text:
            _check_characters(where, record)
        yield where, record


def _check_characters(where: str, record: Record) -> None:
    """BadInput for escapes of half a character (a lone surrogate), which JSON allows and no text can hold."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise BadInput(f"{where} holds {half}, half of a character. Mend the line, or take it out.") from error


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(where, line) of the lines that are not blank, decompressed on the way."""
    with io.BufferedReader(_decompressed(file)) if file.suffix == ".zst" else open(file, "rb") as lines:
        numbered = enumerate(lines, 1)
        while True:
            try:
                number, line = next(numbered)
            except StopIteration:
                return
            except OSError as error:
                if file.suffix != ".zst":
                    raise
                raise BadInput(f"{file} is damaged: {error}. Fetch it again, and run the command again.") from error
            if line.strip():
                yield f"{file}, line {number}", line


def _decompressed(file: Path) -> Any:
    """Pyarrow's reader, because it notices a file that was cut off; others end there as if it were whole."""
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}). Convert the file, for example with iconv."
        ) from error


def _parquet_records(file: Path, start: int) -> Iterator[tuple[str, Record]]:
    """Row groups that lie before `start` are not decoded."""
    opened, before = _open_parquet(file), 0
    for group in range(opened.num_row_groups):
        end = before + opened.metadata.row_group(group).num_rows
        if end > start:
            number = before
            for batch in _batches(file, opened, group):
                skipped = min(max(start - number, 0), len(batch))
                for row, record in enumerate(batch.slice(skipped).to_pylist(), number + skipped + 1):
                    yield f"{file}, row {row}", record
                number += len(batch)
        before = end


def _batches(file: Path, opened: Any, group: int) -> Iterator[Any]:
    from pyarrow import ArrowException

    try:
        yield from opened.iter_batches(PARQUET_BATCH, row_groups=[group])
    except (ArrowException, OSError) as error:
        raise BadInput(f"{file} is damaged: {error}. Fetch it again, and run the command again.") from error


def _open_parquet(file: Path) -> Any:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise BadInput(f"{file} is not a whole Parquet file ({error}). Fetch it again, or leave it out.") from error


def _num_records(file: Path) -> int:
    if file.suffix == ".parquet":
        return _open_parquet(file).metadata.num_rows
    return sum(1 for _ in _lines(file))


def is_local(source: SourceConfig) -> bool:
    """Whether a source lies on this machine; else it is a dataset of the hub."""
    return Path(source.path).exists()


def hub_commit(source: SourceConfig) -> str:
    """The commit that the `revision` of a hub dataset stands for now; BadInput as for opening it."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.path, revision=source.revision).sha)
    except Exception as error:  # connection, authorisation, not found: the library raises many kinds
        raise _refusal(source, error) from error


def _dataset_records(source: SourceConfig, start: int, seed: int | None) -> Iterator[tuple[str, Record]]:
    """Records of a hub dataset or of a local folder: from the moment it is opened there is no difference."""
    try:
        records = _open_dataset(source)
        if seed is not None:
            records = records.shuffle(seed=seed, buffer_size=1)  # mixes the parts; `read_source` mixes the records
        for number, record in enumerate(records.skip(start) if start else records, start + 1):
            yield f"{source.path}, row {number}", record
    except Exception as error:  # the library raises many kinds, from connection errors to its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise _refusal(source, error) from error


def _open_dataset(source: SourceConfig) -> Any:
    """A stream of records. Access to gated datasets comes from HF_TOKEN, which the library reads."""
    import datasets

    if not any((Path(source.path) / name).exists() for name in SAVED):
        options = {"name": source.subset, "split": source.split, "revision": source.revision}
        return datasets.load_dataset(source.path, **options, streaming=True)
    saved = datasets.load_from_disk(source.path)
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise ValueError(f"it has no split {source.split!r}, but {sorted(saved)}")
        saved = saved[source.split]
    return saved.to_iterable_dataset()


def _refusal(source: SourceConfig, error: Exception) -> BadInput:
    import huggingface_hub

    if "gated" in f"{type(error).__name__} {error} {error.__cause__}".lower():
        known = "the token in use has no access to it" if huggingface_hub.get_token() else "there is no token"
        return BadInput(
            f"corpus source {source.path} is a gated dataset, and {known}. Accept its terms at "
            f"https://huggingface.co/datasets/{source.path} and set HF_TOKEN=hf_... of the same account."
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BadInput(
        f"corpus source {source.path} is neither a file nor a dataset that could be opened ({first}). "
        "Check its path, subset, split and revision; a private dataset needs HF_TOKEN. Finished shards are kept."
    )
