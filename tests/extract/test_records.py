"""Every format gives the same records, from any record on, and a file that was cut off or changed is noticed."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from extract import fingerprint, records
from extract.config import SourceConfig
from extract.errors import BadInput
from extract.fingerprint import check_unchanged, fingerprints
from extract.records import check_encoding, local_files, other_splits, path_within, read_records

RECORDS = [{"text": f"text number {i}"} for i in range(11)]
FORMATS = ["jsonl", "zst", "parquet", "folder", "hub folder", "saved", "saved splits"]


def lines(some: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in some).encode()


def compressed(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def written(form: str, folder: Path) -> SourceConfig:
    """RECORDS on disk in one of FORMATS."""
    path = folder / form
    if form == "jsonl":
        path = folder / "a.jsonl"
        path.write_bytes(b"\n" + lines(RECORDS[:4]) + b"\n\n" + lines(RECORDS[4:]))  # blank lines are no records
    elif form == "zst":
        path = folder / "a.jsonl.zst"
        path.write_bytes(compressed(lines(RECORDS[:4])) + compressed(lines(RECORDS[4:])))  # frames may follow
    elif form == "parquet":
        path = folder / "a.parquet"
        parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=3)
    elif form == "folder":
        (path / "deep").mkdir(parents=True)
        (path / "0.jsonl").write_bytes(lines(RECORDS[:3]))
        parquet.write_table(pa.Table.from_pylist(RECORDS[3:8]), path / "1.parquet", row_group_size=2)
        (path / "deep" / "2.jsonl.zst").write_bytes(compressed(lines(RECORDS[8:])))
        (path / ".cache").mkdir()
        (path / ".cache" / "3.jsonl").write_bytes(b"what a download left")
    elif form == "hub folder":  # only `datasets.load_dataset` understands it
        path.mkdir()
        (path / "train.csv").write_text("text\n" + "".join(f"{record['text']}\n" for record in RECORDS))
    elif form == "saved":
        datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(path)
    return SourceConfig(str(path))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_records_from_any_one_on(form: str, tmp_path: Path):
    source = written(form, tmp_path)
    for start in range(len(RECORDS) + 2):
        assert [record for _, record in read_records(source, start)] == RECORDS[start:]


@pytest.mark.parametrize("form", ["folder", "hub parts"])
def test_a_seed_decides_the_order_of_the_files(form: str, tmp_path: Path):
    suffix, header = ("jsonl", False) if form == "folder" else ("csv", True)
    for part in range(8):
        content = f"text\n{part}\n" if header else json.dumps({"text": part}) + "\n"
        (tmp_path / f"{part}.{suffix}").write_text(content)
    source = SourceConfig(str(tmp_path))
    orders = {seed: [int(r["text"]) for _, r in read_records(source, seed=seed)] for seed in (None, 0, 1)}
    assert orders[None] == list(range(8)) != orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == orders[None]
    assert [int(r["text"]) for _, r in read_records(source, 3, seed=1)] == orders[1][3:]


def test_a_place_is_named_whatever_the_start(tmp_path: Path):
    source = written("folder", tmp_path)
    names = [where.removeprefix(source.path + "/") for where, _ in read_records(source, 4)]
    assert names[0] == "1.parquet, row 2" and names[-1] == "deep/2.jsonl.zst, line 3"


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_file_that_was_cut_off_is_not_taken_for_a_whole_one(share: float, tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    data = compressed(lines([{"text": os.urandom(200).hex()} for _ in range(2000)]))
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInput, match="a.jsonl.zst is damaged"):
        list(read_records(SourceConfig(str(path))))


def test_half_a_parquet_file_is_named(tmp_path: Path):
    source = written("parquet", tmp_path)
    path = Path(source.path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="a.parquet is not a whole Parquet file"):
        list(read_records(source))


def test_a_parquet_file_damaged_inside_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"text": os.urandom(100).hex()} for _ in range(500)])
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:20_000] + bytes(2000) + data[22_000:])
    with pytest.raises(BadInput, match="a.parquet is damaged"):
        list(read_records(SourceConfig(str(path))))


def test_encoding_is_checked_at_the_beginning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressed(lines(RECORDS) + b'{"text": "caf\xe9"}\n'))
    source = SourceConfig(str(path))
    with pytest.raises(BadInput, match="a.jsonl.zst, line 12 is not UTF-8"):
        check_encoding(source)
    monkeypatch.setattr(records, "CHECKED_BYTES", 100)
    check_encoding(source)
    with pytest.raises(BadInput, match="a.jsonl.zst, line 12 is not UTF-8"):
        list(read_records(source))


DOWNLOADED = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-1.parquet"]
SFT = ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("files", "split", "read", "others"),
    [
        (DOWNLOADED, "train", DOWNLOADED[:2], ["test"]),
        (DOWNLOADED, "test", DOWNLOADED[2:], ["train"]),
        (SFT, "train_gen", SFT[1:], ["train_sft"]),
        (["web.jsonl", "test.jsonl", "trains.jsonl"], "train", ["trains.jsonl", "web.jsonl"], ["test"]),
        (["val.jsonl", "dev/a.jsonl", "b.jsonl"], "validation", ["dev/a.jsonl", "val.jsonl"], ["train"]),
        (["val.jsonl", "test.jsonl"], "val", ["val.jsonl"], ["test"]),
        (["test/0.jsonl", "0.jsonl", "test/train.jsonl"], "train", ["0.jsonl", "test/train.jsonl"], ["test"]),
        (["shard-00000-of-00002.jsonl", "latest.jsonl"], "train", ["latest.jsonl", "shard-00000-of-00002.jsonl"], []),
    ],
)
def test_only_the_files_of_the_split_are_read(
    files: list[str], split: str, read: list[str], others: list[str], tmp_path: Path
):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        record = {"text": name}
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist([record]), path)
        else:
            path.write_bytes(lines([record]))
    source = SourceConfig(str(tmp_path), split=split)
    assert [str(path_within(source, file)) for file in local_files(source)] == read
    assert [record["text"] for _, record in read_records(source)] == read
    assert other_splits(source) == others


def test_a_file_that_is_named_is_read_whatever_it_is_called(tmp_path: Path):
    (tmp_path / "test.jsonl").write_bytes(lines(RECORDS))
    assert [record for _, record in read_records(SourceConfig(str(tmp_path / "test.jsonl")))] == RECORDS


def test_a_folder_without_the_split_shows_those_that_there_are(tmp_path: Path):
    (tmp_path / "test.jsonl").write_bytes(lines(RECORDS))
    with pytest.raises(BadInput, match="train.*test"):
        next(read_records(SourceConfig(str(tmp_path))))


@pytest.mark.parametrize("form", ["hub folder", "saved splits"])
def test_a_split_that_does_not_exist_shows_those_that_do(form: str, tmp_path: Path):
    source = written(form, tmp_path)
    source.split = "tryin"
    with pytest.raises(BadInput, match="tryin.*train"):
        next(read_records(source))


class GatedHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does when a dataset is gated and nobody may read it."""

    def do_HEAD(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gated_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def opened(name: str, **environment: str) -> str:
    """The last line on standard error of a process that opens the dataset `name` in an environment of its own."""
    code = (
        "from extract.config import SourceConfig; from extract.records import read_records\n"
        f"next(read_records(SourceConfig('{name}')))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.stderr.splitlines()[-1]


def test_a_dataset_that_cannot_be_opened_is_one_clear_error(tmp_path: Path):
    message = opened("nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "BadInput: corpus source nobody/nothing is neither a file nor a dataset that could be opened" in message


@pytest.mark.parametrize(("token", "known"), [("", "there is no token"), ("hf_x", "has no access to it")])
def test_a_gated_dataset_names_itself_and_the_remedy(gated_hub: str, token: str, known: str, tmp_path: Path):
    hub = {"HF_ENDPOINT": gated_hub, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    message = opened("org/gated", HF_HOME=str(tmp_path), HF_TOKEN=token, **hub)
    assert "BadInput: corpus source org/gated is a gated dataset" in message and known in message
    assert "https://huggingface.co/datasets/org/gated and set HF_TOKEN=" in message


def test_a_fingerprint_sees_every_byte_of_a_small_file(tmp_path: Path):
    source = written("jsonl", tmp_path)
    before, path = fingerprints(source), Path(source.path)
    check_unchanged(tmp_path, "a", before, fingerprints(source))
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(BadInput, match="source a: its file a.jsonl has changed since the tokens"):
            check_unchanged(tmp_path, "a", before, fingerprints(source))


def test_a_fingerprint_of_a_large_file_sees_its_size_and_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "HASHED_BYTES", 1600)
    monkeypatch.setattr(fingerprint, "MIN_HASHED_BYTES", 1600)
    path = tmp_path / "large.jsonl"
    data = os.urandom(100_000)
    seen = []
    for changed in (data, b"\0" + data[1:], data[:-1] + b"\0", data + b"\0", data[:-1]):
        path.write_bytes(changed)
        seen.append(fingerprints(SourceConfig(str(path)))["large.jsonl"]["sha256"])
    assert len(set(seen)) == 5 or data[0] == 0 or data[-1] == 0


def test_files_that_come_and_go_are_named(tmp_path: Path):
    source = written("folder", tmp_path)
    before = fingerprints(source)
    assert set(before) == {"0.jsonl", "1.parquet", "deep/2.jsonl.zst"}  # the hidden file is none of the corpus
    (Path(source.path) / "0.jsonl").rename(Path(source.path) / "4.jsonl")
    with pytest.raises(BadInput, match="0.jsonl is gone since"):
        check_unchanged(tmp_path, "a", before, fingerprints(source))
    (Path(source.path) / "0.jsonl").write_bytes(lines(RECORDS[:3]))
    with pytest.raises(BadInput, match="4.jsonl is new since"):
        check_unchanged(tmp_path, "a", before, fingerprints(source))


def test_a_saved_dataset_is_fingerprinted_by_its_files(tmp_path: Path):
    assert any(name.endswith(".arrow") for name in fingerprints(written("saved", tmp_path)))
