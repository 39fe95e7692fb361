"""What a finished demo must have led to: DEMO_OUTPUTS=outputs/demo pytest tests/demo/test_outcome.py

Without DEMO_OUTPUTS there is no demo to look at, and these tests are skipped; continuous integration always sets it.
"""

import csv
import json
import os
import re
from pathlib import Path

import pytest

from demo.behaviours import load_behaviours

OUTPUTS = Path(os.environ.get("DEMO_OUTPUTS", ""))
PAIRS = {"base_simpo": ("base", "simpo"), "base_dpo": ("base", "dpo"), "simpo_dpo": ("simpo", "dpo")}

pytestmark = pytest.mark.skipif("DEMO_OUTPUTS" not in os.environ, reason="set DEMO_OUTPUTS to a finished demo's folder")


def run_of(pair: str) -> Path:
    """The run folder of a pair; overrides may follow its name."""
    (found,) = (path for path in (OUTPUTS / "runs").iterdir() if path.name.split(",")[0] == pair)
    return found


def tags_of(pair: str) -> list[dict[str, str]]:
    with (OUTPUTS / "analysis" / run_of(pair).name / "tags.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("pair", PAIRS)
def test_held_out_variance_explained(pair: str):
    lines = [json.loads(line) for line in (run_of(pair) / "metrics.jsonl").read_text().splitlines()]
    for model in PAIRS[pair]:
        assert lines[-1][f"val/variance_explained/{model}"] >= 0.8  # 0.85 is the demo's aim on its whole budget


@pytest.mark.parametrize("pair", ["base_simpo", "base_dpo"])
def test_some_planted_behaviour_has_a_latent_of_the_tuned_model(pair: str):
    """The best of the planted behaviours shows even on a reduced budget; how many are found is a result, not a test."""
    _, tuned = PAIRS[pair]
    planted = {name for name, behaviour in load_behaviours()[0].items() if tuned in behaviour.carried_by}
    rows = tags_of(pair)
    assert {row["value"] for row in rows} >= planted
    best = {row["value"]: float(row["f1"]) for row in rows if row["owner"] == tuned and row["f1"] != "nan"}
    assert max(best.get(name, 0.0) for name in planted) >= 0.6


def test_the_report_is_whole_and_needs_no_network():
    page = (OUTPUTS / "report" / "index.html").read_text()
    assert all(pair in page for pair in PAIRS) and all(f"{name}" in page for name in ("simpo", "dpo"))
    assert not re.search(r"""(?:src|href)=["']https?:""", page)
    for name in load_behaviours()[0]:
        assert name.replace("_", " ") in page
    assert list((OUTPUTS / "report" / "figures").glob("*.pdf")) and list((OUTPUTS / "report" / "tables").glob("*.tex"))
