"""`python -m analysis.compare experiment=STUDY` beside a finished report of the same study."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.annotate.step import annotate
from analysis.compare.command import compare_study
from analysis.config import AnalysisSettings
from analysis.steps import run_steps, steps_of_study
from analysis.taxonomy.step import categorise
from extract.command import compose
from tests.analysis.made_study import make_study


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_settings_leave_the_report_and_its_tables_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder, settings.analysis.compare.resamples = "tfidf", 200
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    target = tmp_path / "report"
    run_steps(steps_of_study(settings, folders), target)
    before = contents(target)
    overrides = ["analysis.compare.resamples=200", "analysis.compare.confidence=0.5"]
    compare_study(compose(AnalysisSettings, ["experiment=demo", f"outputs={tmp_path}", *overrides]))
    assert contents(target) == before and not run_steps(steps_of_study(settings, folders), target)
    tables = tmp_path / "compare" / "tables"
    assert f"Tables: {tables}" in capsys.readouterr().out
    assert (tables / "class_simpo_dpo.csv").read_bytes() != before[target / "tables" / "class_simpo_dpo.csv"]
