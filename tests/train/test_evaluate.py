"""`python -m train.evaluate`: every state of a run once, while training goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL

from extract.activations import extract
from extract.command import compose
from extract.errors import BadInput
from extract.tokens import make_tokens
from tests.wandb_files import isolate, offline_parts
from train import evaluate as command
from train import spliced
from train.crosscoder import Crosscoder
from train.data import ActivationPairs
from train.evaluate import FILE, EvaluateSettings, evaluate
from train.recovered import LossRecovered
from train.trainer import train

ROOT = Path(__file__).resolve().parents[2]
KEPT = ["training.keep_every=20", "training.checkpoint_every=10", "training.keep_checkpoints=1"]


def settings_of(study: list[str], *overrides: str) -> EvaluateSettings:
    return compose(EvaluateSettings, [*study, *SMALL, *KEPT, "recovered_tokens=100", *overrides])


@pytest.fixture
def run(study, tmp_path) -> Path:
    """A finished run of 50 steps, of which the checkpoints after 20, 40 and 50 are left."""
    settings = settings_of(study)
    make_tokens(settings)
    extract(settings)
    train(settings, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_models(monkeypatch):
    """From the call on no language model may be loaded."""
    return lambda: monkeypatch.setattr(spliced, "load_causal", lambda *_: pytest.fail("a model was loaded"))


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def test_every_state_is_measured_once_as_training_measures_it(study, run, no_models):
    settings = settings_of(study)
    assert evaluate(settings, run) == run / FILE
    lines = lines_of(run)
    found = [(line["step"], line["of"]) for line in lines]
    assert found == [(20, "step-00000020"), (40, "step-00000040"), (50, "crosscoder")]
    trained = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for line in lines:
        own = {name: value for name, value in trained[line["step"]].items() if name.startswith("val/")}
        assert {"val/l0", "val/variance_explained/tuned"} <= own.keys()
        for name, value in own.items():
            assert line[name] == (value if isinstance(value, dict) else pytest.approx(value, rel=1e-5))
        assert line["replaced_tokens"] == 100 < line["validation_tokens"]
    data = ActivationPairs.open(settings)
    loss = LossRecovered(settings, data, 100)
    operands = command.Operands.of(crosscoder := Crosscoder.load(run / "crosscoder"))
    expected = loss.measure(lambda x_TMD: command.reconstructions(crosscoder, x_TMD, operands))
    assert {name: lines[-1][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert lines[-1]["predicted_tokens"] == loss.documents.num_predicted
    no_models()
    evaluate(settings, run)
    evaluate(settings_of(study, "steps=published"), run)
    assert lines_of(run) == lines


def test_what_was_not_measured_with_the_same_is_measured_again(study, run):
    evaluate(settings_of(study, "steps=last"), run)
    evaluate(settings_of(study, "steps=last", "recovered_tokens=0"), run)
    evaluate(settings_of(study, "steps=last", "data.max_validation_tokens=60"), run)
    first, second, third = lines_of(run)
    assert {line["step"] for line in (first, second, third)} == {50}
    assert len({line["measured_with"] for line in (first, second, third)}) == 3
    assert "val/loss_recovered/base" in first and not any("recovered" in name for name in second)
    assert second["val/variance_explained/base"] == first["val/variance_explained/base"]
    assert third["validation_tokens"] == third["replaced_tokens"] == 60


def test_it_continues_after_a_line_that_was_cut_short(study, run):
    settings = settings_of(study, "recovered_tokens=0")
    evaluate(settings, run)
    whole = (run / FILE).read_text()
    (run / FILE).write_text(whole[: whole.index("\n") + 30])
    evaluate(settings, run)
    assert (run / FILE).read_text() == whole


@pytest.mark.slow
def test_all_evaluations_are_one_run_on_wandb(study, run, tmp_path, monkeypatch):
    """In the order in which states were measured: the newest, by a first command, then the others, by a second."""
    isolate(monkeypatch, tmp_path)
    limits = ["tracking.start_timeout_s=300", "tracking.end_timeout_s=300"]
    for steps in ("last", "all", "all"):
        evaluate(settings_of(study, "tracking.mode=offline", f"steps={steps}", *limits), run)
    first, second = offline_parts(run / "evaluation")
    assert first.run_id == second.run_id and (first.exit_code, second.exit_code) == (0, 0)
    assert (first.run["job_type"], first.run["display_name"]) == ("evaluate", "run evaluation")
    rows = [*first.history, *second.history]
    assert [row["step"] for row in rows] == [50, 20, 40] and [row["_step"] for row in rows] == [0, 1, 2]
    assert all("val/loss_recovered/tuned" in row and "val/firing_frequency.values" in row for row in rows)


def test_states_may_come_and_go_meanwhile(study, run, tmp_path, monkeypatch):
    """Beside training that ends: a checkpoint and the published crosscoder come, another checkpoint is removed, and one
    is damaged.
    """
    settings, checkpoints = settings_of(study, "recovered_tokens=0"), run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000040", aside := tmp_path / "step-00000040")
    shutil.move(run / "crosscoder", tmp_path / "crosscoder")
    weights = next((checkpoints / "step-00000040").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    measure = command.measure

    def meanwhile(*arguments):
        if not (run / "crosscoder").exists():
            shutil.move(tmp_path / "crosscoder", run / "crosscoder")
            shutil.rmtree(checkpoints / "step-00000050")
        return measure(*arguments)

    monkeypatch.setattr(command, "measure", meanwhile)
    evaluate(settings, run)
    assert [(line["step"], line["of"]) for line in lines_of(run)] == [(20, "step-00000020"), (50, "crosscoder")]
    shutil.rmtree(checkpoints / "step-00000040")
    shutil.move(aside, checkpoints)
    evaluate(settings, run)
    assert [line["step"] for line in lines_of(run)] == [20, 50, 40]


def test_a_checkpoint_that_disappears_while_it_is_opened_is_left_out(study, run, monkeypatch):
    settings = settings_of(study, "recovered_tokens=0")
    read = command.Checkpoints.read

    def removed(self, path):
        if path.name == "step-00000020":
            shutil.rmtree(path)
        return read(self, path)

    monkeypatch.setattr(command.Checkpoints, "read", removed)
    evaluate(settings, run)
    assert [line["step"] for line in lines_of(run)] == [40, 50]


def test_before_the_threshold_there_is_no_loss_recovered(study, tmp_path):
    settings = settings_of(study, "crosscoder.threshold_start_step=30")
    make_tokens(settings)
    extract(settings)
    train(settings, tmp_path / "run")
    evaluate(settings, tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert ["val/loss_recovered/base" in line for line in lines] == [False, True, True]
    assert all("val/variance_explained/base" in line for line in lines)


def test_computed_activations_do_as_well(study, tmp_path):
    settings = settings_of(study, "data=online", "steps=last")
    make_tokens(settings)
    train(settings, tmp_path / "run")
    evaluate(settings, tmp_path / "run")
    (line,) = lines_of(tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["val/variance_explained/tuned"] == pytest.approx(last["val/variance_explained/tuned"], rel=1e-5)
    assert line["replaced_tokens"] == 100


def test_what_cannot_be_measured_is_refused(study, run, tmp_path):
    with pytest.raises(BadInput, match="other settings or data .*crosscoder.k: 3 there, 5 now"):
        evaluate(settings_of(study, "crosscoder.k=5"), run)
    with pytest.raises(BadInput, match=r"neither a complete checkpoint nor .*checkpoint_every=10 .*keep_every=20"):
        evaluate(settings_of(study), tmp_path / "nothing")
    with pytest.raises(BadInput, match="holds no published crosscoder: the run has not ended"):
        evaluate(settings_of(study, "steps=published"), tmp_path / "nothing")
    with pytest.raises(BadInput, match="steps=first"):
        settings_of(study, "steps=first")
    with pytest.raises(BadInput, match="recovered_tokens=-1 must not be negative"):
        settings_of(study, "recovered_tokens=-1")
    with pytest.raises(BadInput, match="data.heldout_fraction=0 holds out no document"):
        settings_of(study, "data.heldout_fraction=0")
    shutil.rmtree(settings_of(study).tokens_folder)
    with pytest.raises(BadInput, match="tokens"):
        evaluate(settings_of(study), run)


def test_the_command_says_in_one_line_what_is_missing(study):
    arguments = [sys.executable, "-m", "train.evaluate", *study, *SMALL]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
