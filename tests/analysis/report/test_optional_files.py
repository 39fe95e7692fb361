"""Damaged files of other steps are one sentence that names the file, the line and the column."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.report.cards import read_scores
from analysis.report.null_ranges import read_nulls
from analysis.report.optional_files import COLUMNS, read_optional
from analysis.report.side_tables import read_table
from analysis.report.training import read_config, read_metrics
from extract.errors import BadInput

NULLS = "null,measure,focus,other,count,q05,q50,q95\nshared,nu_error,a,b,3,0.1,0.2,0.3\n"
RULES = "rule,threshold,owner,count\nnorm,0.1,a,3\n"
SCORES = "latent,kind,control,balanced_accuracy,low,high\n3,detection,none,0.9,0.8,1.0\n"


def test_nulls_without_their_second_measure_are_none(tmp_path: Path) -> None:
    (tmp_path / "nulls.csv").write_text(NULLS)
    assert read_nulls(tmp_path) == []
    (tmp_path / "nulls.csv").write_text(NULLS + "shared,nu_reconstruction,a,b,3,0.4,0.5,0.6\n")
    (found,) = read_nulls(tmp_path)
    assert (found.error, found.reconstruction) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_file_without_its_columns_or_of_another_encoding_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content, problem in ((b"", "has no column"), (b"a,b\n1,2\n", "has no column"), (b"\xff\xfe\n", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}.*{problem}"):
            read_optional(path)


def test_rows_that_are_short_and_cells_that_are_no_numbers_are_named_by_their_lines(tmp_path: Path) -> None:
    rules, scores = tmp_path / "rules.csv", tmp_path / "scores.csv"
    rules.write_text(RULES + "norm,0.1\n")
    with pytest.raises(BadInput, match=r"rules\.csv, line 3, has 2 cells for 4 columns"):
        read_table(rules, "")
    rules.write_text(RULES + "norm,0.1,a,many\n")
    with pytest.raises(BadInput, match=r"line 3: count \('many'\) is no number"):
        read_table(rules, "")
    scores.write_text(SCORES + "x,detection,none,0.9,0.8,1.0\n")
    with pytest.raises(BadInput, match=r"scores\.csv, line 3: latent \('x'\) is no number"):
        read_scores(tmp_path)
    scores.write_text(SCORES)
    assert list(read_scores(tmp_path)) == [3]


def test_a_torn_last_line_of_metrics_is_left_out_and_another_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl, line 1, is no JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n17\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl, line 2, is no JSON object"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_settings_of_a_run_that_are_no_yaml_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1,")
    with pytest.raises(BadInput, match=r"config\.yaml is no YAML"):
        read_config(tmp_path / "config.yaml")
