"""What the analysis logs to W&B: latents by owner, tables, the report and an artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.annotate.step import annotate
from analysis.compare.step import compare
from analysis.report.step import report
from analysis.taxonomy.step import categorise
from analysis.tracking import files_of, latents_by_owner, track
from tests.analysis.made_study import make_study
from tests.wandb_files import isolate, offline_parts
from train.metric_table import METRICS, NUMBER


def test_latents_are_counted_by_owner(tmp_path: Path):
    table = tmp_path / "owners.csv"
    table.write_text("pair,owner,count,total\na,base,3,10\na,shared,7,10\n")
    assert latents_by_owner(table) == {"analysis/latents/a/base": 3, "analysis/latents/a/shared": 7}


def test_what_no_report_of_today_wrote_is_neither_kept_nor_sent(tmp_path: Path):
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    target = report(settings, folders).parent
    gone = [path for name in ("figures", "tables") for path in (target / name).glob("*dpo*")]
    own = [target / "figures" / "figure1_base_dpo_for_the_talk.pdf", target / "tables" / "class_notes.csv"]
    for path in own:
        path.write_text("a user's own")
    assert len(gone) > 20
    report(settings, folders[:1])  # the pair base_dpo and its comparison are gone
    assert not [path for path in gone if path.exists()] and all(path.exists() for path in own)
    sent = files_of(settings, folders[:1], target)
    assert {"report/index.html", "report/tables/owners.csv", "report/figures/flow.png"} <= set(sent)
    assert not set(own) & set(sent.values())


@pytest.mark.slow
def test_an_analysis_is_a_run_with_tables_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    isolate(monkeypatch, tmp_path)
    settings, folders = make_study(tmp_path / "study")
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    settings.tracking.mode = "offline"
    settings.tracking.start_timeout_s = settings.tracking.end_timeout_s = 300.0
    compare(settings, folders, Path(settings.outputs) / "report")
    target = report(settings, folders).parent
    track(settings, folders, target)
    track(settings, folders, target)
    first, second = offline_parts(target)
    assert first.run_id == second.run_id and first.run["job_type"] == "analysis" and first.exit_code == 0
    (row,), (again,) = first.history, second.history
    assert (row["_step"], again["_step"]) == (0, 1)
    shown = {name.removesuffix("._type") for name in row if name.endswith("._type")}
    numbers = {name for name in row if name.startswith("analysis/latents/")}
    tables = [f"{kind}{level}_simpo_dpo" for kind in ("", "changes_", "certain_") for level in ("class", "category")]
    compared = {f"analysis/comparisons/{name}" for name in (*tables, "comparisons", "flow")}
    assert shown == {"analysis/owners", "analysis/report", *compared} | {
        f"analysis/{table}/{folder.name}" for table in ("categories", "classes") for folder in folders
    }
    assert {row[f"{name}._type"] for name in shown} == {"table-file", "html-file"}
    promised = [metric for metric in METRICS if metric.section == "analysis"]
    assert all(any(m.matches(n) for n in (numbers if m.kind == NUMBER else shown)) for m in promised)
    assert row["analysis/latents/base_simpo/simpo"] >= 3
    assert "analysis-made" in {artifact["name"] for artifact in first.artifacts}
