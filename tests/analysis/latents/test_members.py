"""From text to the report of two layers of one model, by the public commands."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.latents.columns import models_of
from analysis.report.behaviours import ABSENT, FOUND, MISSED, UNTUNED, verdict
from tests.analysis.test_main import TRAINING

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ["base@block0", "base@block2"]


@pytest.mark.slow
def test_layers_of_a_model_from_text_to_report(study: list[str], tmp_path: Path):
    study = [*study, "pairs.base_tuned=[base@block0,base@block2]"]

    def command(module: str, *overrides: str) -> None:
        arguments = [sys.executable, "-m", module, *study, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    command("extract.tokens")
    command("extract.activations")
    command("train", *TRAINING[:-1])
    command("analysis", *TRAINING)
    store, folder = tmp_path / "outputs" / "store", next((tmp_path / "outputs" / "analysis").iterdir())
    assert sorted(path.name for path in (store / "activations").glob("*/*")) == ["block0", "block2"]
    assert models_of(folder) == LAYERS
    table = pq.read_table(folder / "latents.parquet")
    assert {f"nu_error_{name}" for name in LAYERS} <= set(table.column_names)
    # 32 latents of which each member owns 8 alone from the start, so that both have cards, wherever they pass.
    assert set(table["owner"].to_pylist()) <= {*LAYERS, "shared", "other", "dead"}
    page = (tmp_path / "outputs" / "report" / "index.html").read_text()
    assert "base@block0 → base@block2; residual stream.</p>" in page
    assert f"base@block2 ({Path(study[1]).name})" in page  # where folders lie is left out: reports are shared
    tables = tmp_path / "outputs" / "report" / "tables"
    with (tables / "owners.csv").open() as file:
        assert set(LAYERS) <= {value for row in csv.reader(file) for value in row}
    assert "base@block0" in (tables / "owners.tex").read_text()


def test_what_was_tuned_into_a_model_belongs_to_it_at_any_hookpoint():
    planted = {"rhyme": ["tuned"], "greeting": ["other"]}
    pair = ["base@block1", "tuned@block2"]
    assert verdict(True, "rhyme", "tuned@block2", pair, planted) == FOUND
    assert verdict(False, "rhyme", "tuned@block2", pair, planted) == MISSED
    assert verdict(True, "rhyme", "base@block1", pair, planted) == UNTUNED
    assert verdict(False, "greeting", "tuned@block2", pair, planted) == ABSENT
