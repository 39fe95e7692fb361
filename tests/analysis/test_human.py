"""Labels by hand: kept in order, the last of a latent counts, and a broken line is named."""

from __future__ import annotations

import threading
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
