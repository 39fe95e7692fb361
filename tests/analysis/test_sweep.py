"""The table and the figure of a sweep: expected values are planted in run folders."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from analysis.config import AnalysisSettings
from analysis.sweep import figure_of, main, table_of, varied
from analysis.sweep_rows import FINISHED, Row, by_norms, rows_of
from analysis.tables import text_of
from extract.config import ModelConfig
from extract.errors import BadInput
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.folder import sha256_of
from train.runs import result_settings

NUM_LATENTS, D_MODEL = 8, 3


def settings_of(outputs: Path, k: int = 2, hookpoint: str = "block9") -> AnalysisSettings:
    settings = AnalysisSettings(
        study="s",
        outputs=str(outputs),
        hookpoint=hookpoint,
        pairs={"base_tuned": ["base", "tuned"]},
        models={name: ModelConfig(id=name) for name in ("base", "tuned")},
    )
    settings.crosscoder.k, settings.training.num_tokens, settings.training.num_tokens_per_step = k, 1000, 10
    return settings


def planted_run(outputs: Path, name: str, k: int, hookpoint: str, explained: float) -> Path:
    """A finished run: of 8 latents two have a zero row in the tuned model's decoder, one in the base's."""
    folder = outputs / "runs" / name
    write_config(folder, settings_of(outputs, k, hookpoint))
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=NUM_LATENTS, k=k), ["base", "tuned"], D_MODEL, hookpoint)
    with torch.no_grad():
        W_dec_LMD = crosscoder.W_dec.view(NUM_LATENTS, 2, D_MODEL)
        W_dec_LMD.fill_(1.0)
        W_dec_LMD[:2, 1], W_dec_LMD[2, 0] = 0.0, 0.0
    crosscoder.save(folder / "crosscoder")
    lines = [
        {"step": 50, "val/l0": 99.0, "val/variance_explained/base": 0.0, "val/variance_explained/tuned": 0.0},
        {
            "step": 100,
            "val/l0": k + 0.5,
            "val/variance_explained/base": explained,
            "val/variance_explained/tuned": explained + 0.1,
        },
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def write_config(folder: Path, settings: AnalysisSettings) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(settings)))


def write_analysis(outputs: Path, run: Path, owners: list[str]) -> None:
    folder = outputs / "analysis" / run.name
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"owner": owners}), folder / "latents.parquet")
    weights = sha256_of(run / "crosscoder" / "crosscoder.safetensors")
    (folder / "latents.json").write_text(json.dumps({"inputs": {"crosscoder.safetensors": weights}}))


def write_record(outputs: Path, name: str, k: int, **known: str | None) -> None:
    """What a sweep wrote down."""
    settings = result_settings(settings_of(outputs, k))
    (outputs / "sweeps").mkdir(exist_ok=True)
    (outputs / "sweeps" / f"{name}.json").write_text(
        json.dumps({"settings": settings, "job": None, "ended": None} | known)
    )


@pytest.fixture
def study(tmp_path: Path) -> AnalysisSettings:
    """Two finished runs, one of them analysed; one that failed on the way, one that waits, one that never ran."""
    first = planted_run(tmp_path, "base_tuned,k=2", 2, "block9", 0.5)
    planted_run(tmp_path, "base_tuned,hookpoint=block10,k=4", 4, "block10", 0.25)
    write_analysis(tmp_path, first, ["base", "other", "tuned", "tuned", "tuned", "shared", "shared", "dead"])
    write_config(tmp_path / "runs" / "base_tuned,k=3", settings_of(tmp_path, 3))
    (tmp_path / "runs" / "base_tuned,k=3" / "metrics.jsonl").write_text('{"step": 40, "train/loss": 1.0}\n')
    write_record(tmp_path, "base_tuned,k=3", 3, ended="killed by SIGKILL")
    write_record(tmp_path, "base_tuned,k=5", 5, job="12_3")
    write_record(tmp_path, "base_tuned,k=6", 6)
    return settings_of(tmp_path)


def test_every_run_is_a_row_that_says_how_far_it_is(study):
    rows = rows_of(study)
    assert [(row.name, row.state) for row in rows] == [
        ("base_tuned,k=2", FINISHED),
        ("base_tuned,k=3", "step 40 of 100, killed by SIGKILL"),
        ("base_tuned,k=5", "no step yet, job 12_3"),
        ("base_tuned,k=6", "no step yet"),
        ("base_tuned,hookpoint=block10,k=4", FINISHED),
    ]
    assert varied(rows) == ["hookpoint", "crosscoder.k"]  # in what runs have saved and sweeps wrote down alike
    assert rows[0].l0 == 2.5 and rows[0].variance_explained == pytest.approx({"base": 0.5, "tuned": 0.6})
    assert rows[0].mean_explained == pytest.approx(0.55) and math.isnan(rows[1].mean_explained)


def test_latents_of_one_model_as_analysed_and_by_norms(study):
    first, *_, last = rows_of(study)
    assert (first.own, first.own_by_norms) == ({"base": 1, "tuned": 3}, {"base": 2, "tuned": 1})
    assert (last.own, last.own_by_norms) == ({}, {"base": 2, "tuned": 1})
    assert (first.num_own, last.num_own_by_norms) == (3, 1) and math.isnan(last.num_own)


def test_an_analysis_of_an_earlier_crosscoder_does_not_count(study):
    record = Path(study.outputs) / "analysis" / "base_tuned,k=2" / "latents.json"
    record.write_text(json.dumps({"inputs": {"crosscoder.safetensors": "another"}}))
    assert rows_of(study)[0].own == {}


def test_a_damaged_crosscoder_is_not_finished_and_said_to_be_damaged(study):
    weights = Path(study.outputs) / "runs" / "base_tuned,k=2" / "crosscoder" / "crosscoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert rows_of(study)[0].state == "damaged crosscoder"


def test_candidates_by_norms_of_dedicated_latents():
    """Of 8 latents 2 are dedicated to each model; the others have equal norms."""
    config = CrosscoderConfig(num_latents=NUM_LATENTS, k=2, dedicated=0.25)
    crosscoder = Crosscoder(config, ["base", "tuned"], D_MODEL, "block9")
    with torch.no_grad():
        crosscoder.W_dec.fill_(1.0)
        crosscoder.zero_foreign_rows(crosscoder.W_dec)
    assert by_norms(crosscoder, AnalysisSettings().analysis.owner) == {"base": 2, "tuned": 2}


def test_the_files_hold_all_rows(study, capsys):
    main(study)
    report = Path(study.outputs) / "report"
    with (report / "tables" / "sweep.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert table["base_tuned,k=2"]["crosscoder.k"] == "2" and table["base_tuned,k=2"]["own_tuned"] == "3"
    assert table["base_tuned,k=3"]["state"].startswith("step 40") and table["base_tuned,k=3"]["l0"] == ""
    assert float(table["base_tuned,hookpoint=block10,k=4"]["variance_explained"]) == pytest.approx(0.3)
    assert (report / "figures" / "sweep.pdf").stat().st_size and (report / "figures" / "sweep.png").stat().st_size
    assert "one tuned model alone" in (report / "figures" / "sweep.txt").read_text()
    said = capsys.readouterr().out
    assert (report / "tables" / "sweep.txt").read_text() in said and "2 of 5 runs are finished" in said


def test_columns_are_the_settings_that_vary():
    rows = [
        Row("p", {"hookpoint": "block1", "crosscoder.k": 2, "seed": n, "training.lr": 1e-3}, FINISHED) for n in (0, 1)
    ]
    assert varied(rows) == ["hookpoint", "crosscoder.k", "seed"]
    assert text_of(table_of(rows)).splitlines()[0].split()[:4] == ["pair", "hookpoint", "k", "seed"]


def test_the_figure_shows_layers_where_there_are_several(study):
    rows = rows_of(study)
    layers = figure_of(rows)
    assert [axes.get_xlabel() for axes in layers.axes][:2] == ["L0", "layer"] and len(layers.axes) == 3
    assert [label.get_text() for label in layers.axes[1].get_xticklabels()] == ["block9", "block10"]
    points = {tuple(np.round(line.get_xydata()[0], 3)) for line in layers.axes[0].lines}
    assert points == {(2.5, 0.55), (4.5, 0.3)}
    assert len(figure_of(rows[:4]).axes) == 2 and len(figure_of(rows[1:3]).axes) == 2


def planted_row(k: int, lr: float, own: int | None) -> Row:
    settings = {"hookpoint": "block1", "crosscoder.k": k, "training.lr": lr}
    analysed = {} if own is None else {"base": 5, "a": own}
    return Row("p", settings, FINISHED, k, {"a": k / 10}, analysed, {"base": 9, "a": 7})


def lines_of(axes) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in axes.lines]


def test_lines_are_named_by_what_they_differ_in():
    explained, _ = figure_of([planted_row(k, lr, 3) for k in (1, 2) for lr in (0.1, 0.0123456)]).axes
    assert [text.get_text() for text in explained.get_legend().get_texts()] == ["lr=0.1", "lr=0.01235"]
    assert lines_of(explained) == [[[1, 0.1], [2, 0.2]]] * 2
    assert figure_of([planted_row(k, 0.1, 3) for k in (1, 2)]).axes[0].get_legend() is None


def test_candidates_are_drawn_where_no_run_is_analysed():
    rows = [planted_row(1, 0.1, 3), planted_row(2, 0.1, None), planted_row(3, 0.1, 4), planted_row(1, 0.2, None)]
    _, latents = figure_of(rows).axes
    assert lines_of(latents) == [[[1, 3], [3, 4]], []] and latents.get_xlabel().endswith("(2 of 4 analysed)")
    _, candidates = figure_of([planted_row(k, 0.1, None) for k in (1, 2)]).axes
    assert lines_of(candidates) == [[[1, 7], [2, 7]]] and "by norms" in candidates.get_xlabel()


def test_a_study_without_runs_says_how_to_make_some(tmp_path):
    with pytest.raises(BadInput, match="has no runs. Run a sweep"):
        rows_of(settings_of(tmp_path))
