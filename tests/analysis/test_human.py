"""Labels by hand: kept in order, the last of a latent counts, and a broken line is named."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.human import HumanLabel, append_label, now, read_labels
from extract.errors import BadInput


def label(latent: int, text: str) -> HumanLabel:
    return HumanLabel(latent, text, "Creative Generation", "über <script>", "anna", now())


def test_the_last_label_of_a_latent_counts_and_none_is_lost(tmp_path: Path) -> None:
    assert read_labels(tmp_path) == {}
    labels = [label(3, "first"), label(4, "other latent"), label(3, "second\nline")]
    for each in labels:
        append_label(tmp_path, each)
    assert read_labels(tmp_path) == {3: labels[2], 4: labels[1]}
    assert len((tmp_path / "human.jsonl").read_text().splitlines()) == 3


def test_a_label_without_anything_withdraws_the_one_before(tmp_path: Path) -> None:
    append_label(tmp_path, label(3, "a slip"))
    append_label(tmp_path, HumanLabel(3, "", "", "not what I meant", "anna", now()))
    assert read_labels(tmp_path) == {}
    append_label(tmp_path, label(3, "better"))
    assert read_labels(tmp_path)[3].label == "better"


def test_writers_at_the_same_time_do_not_mix_their_lines(tmp_path: Path) -> None:
    def write(start: int) -> None:
        for latent in range(start, start + 20):
            append_label(tmp_path, label(latent, "x" * 2000))

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 20, 40, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_labels(tmp_path)) == set(range(80))


def test_a_writer_waits_for_the_one_before(tmp_path: Path) -> None:
    """Else the end of the file, to which a line that does not fit is cut back, might be another's line."""
    append_label(tmp_path, label(3, "first"))
    with (tmp_path / "human.jsonl").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=append_label, args=(tmp_path, label(4, "second")))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and set(read_labels(tmp_path)) == {3}
    writer.join(30)
    assert set(read_labels(tmp_path)) == {3, 4}


@pytest.mark.parametrize("line", ['{"latent": 3', '{"latent": 3}', "[]", '{"latent": "3", "label": ""}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    append_label(tmp_path, label(3, "good"))
    with (tmp_path / "human.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(BadInput, match=r"human\.jsonl, line 2"):
        read_labels(tmp_path)


def test_values_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    bad = '{"latent": "3", "label": "", "category": "", "note": "", "who": "", "at": ""}\n'
    (tmp_path / "human.jsonl").write_text(bad)
    with pytest.raises(BadInput, match="latent must be a number"):
        read_labels(tmp_path)


def record(folder: Path, weights: str) -> None:
    """As the first step of an analysis leaves it."""
    (folder / "latents.json").write_text(json.dumps({"step": "latents", "inputs": {"crosscoder.safetensors": weights}}))


def test_labels_of_another_crosscoder_are_kept_but_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(tmp_path, "aaaa")
    append_label(tmp_path, label(3, "of the first"))
    append_label(tmp_path, label(4, "of the first"))
    assert read_labels(tmp_path)[3].crosscoder == "aaaa" and not caplog.records
    record(tmp_path, "bbbb")  # trained again under the same name
    assert read_labels(tmp_path) == {}
    assert caplog.messages == [f"{tmp_path / 'human.jsonl'}: 2 of 2 lines are of another crosscoder and not used"]
    append_label(tmp_path, label(4, "of the second"))
    assert {latent: given.label for latent, given in read_labels(tmp_path).items()} == {4: "of the second"}
    record(tmp_path, "aaaa")
    assert set(read_labels(tmp_path)) == {3, 4}


def test_a_line_without_a_crosscoder_is_of_none_that_is_known(tmp_path: Path) -> None:
    append_label(tmp_path, label(3, "before there was a record"))
    line = json.loads((tmp_path / "human.jsonl").read_text())
    del line["crosscoder"]
    (tmp_path / "human.jsonl").write_text(json.dumps(line) + "\n")
    assert set(read_labels(tmp_path)) == {3}
    record(tmp_path, "aaaa")
    assert read_labels(tmp_path) == {}


def test_a_label_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    first = label(3, "fits")
    append_label(tmp_path, first)
    path, limits = tmp_path / "human.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_label(tmp_path, label(4, "is cut off"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_label(tmp_path, label(5, "the next"))
    assert set(read_labels(tmp_path)) == {3, 5}


def test_a_line_that_was_cut_off_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    append_label(tmp_path, label(3, "whole"))
    path = tmp_path / "human.jsonl"
    path.write_bytes(path.read_bytes() + b'{"latent": 4, "la')
    append_label(tmp_path, label(5, "the next"))
    with pytest.raises(BadInput, match=r"human\.jsonl, line 2, is no label"):
        read_labels(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[2]}\n")
    assert set(read_labels(tmp_path)) == {3, 5}


def test_a_label_is_on_the_disk_when_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fsync: Callable[[int], None] = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sizes.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    append_label(tmp_path, label(3, "kept"))
    assert sizes == [(tmp_path / "human.jsonl").stat().st_size] and sizes[0] > 0
