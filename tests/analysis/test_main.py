"""The command from a tiny study's stores and crosscoder to its report; what is missing; what a second run repeats."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.__main__ import analysed_folders, folders_of, main
from analysis.config import AnalysisSettings
from analysis.latents.state import STATE_FILE
from extract.activations import extract
from extract.command import compose
from extract.errors import BadInput
from extract.tokens import make_tokens
from tests.analysis.asked import MODEL, by_prompt, config
from tests.analysis.messages_stub import MessagesStub
from train.trainer import train

TRAINING = [
    "training.num_tokens=1600",
    "training.num_tokens_per_step=64",
    "training.warmup_steps=5",
    "training.device=cpu",
    "crosscoder.num_latents=32",
    "crosscoder.k=4",
    "crosscoder.dedicated=0.25",
    "crosscoder.threshold_start_step=5",
    "tracking.mode=disabled",
    "analysis.device=cpu",
]


@pytest.fixture
def trained(study: list[str]) -> AnalysisSettings:
    settings = compose(AnalysisSettings, [*study, *TRAINING])
    make_tokens(settings)
    extract(settings)
    train(settings, folders_of(settings)[0].parent)
    return settings


def test_from_a_crosscoder_to_the_report(trained: AnalysisSettings, capsys: pytest.CaptureFixture[str]) -> None:
    main(trained)
    _, folder = folders_of(trained)
    report = Path(trained.outputs) / "report" / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {report}"
    assert report.stat().st_size > 0
    assert folder.name.startswith("base_tuned,") and ",k=4," in folder.name
    steps = ["annotate", "categorise", "latents", "score", "tags"]
    assert sorted(path.stem for path in folder.glob("*.json")) == steps
    assert not list(Path(trained.outputs).rglob("*.partial"))
    assert pq.read_metadata(folder / "latents.parquet").num_rows == 32
    pooled = folder.parent / "agreement.csv"
    pooled.unlink()
    main(trained)  # over the latents of all pairs, as the report shows it
    assert pooled.exists() and "report: agreement\n" in capsys.readouterr().out

    main(trained)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("is up to date") for line in lines] == [True] * (len(steps) + 3) + [False]

    shutil.rmtree(report.parent / "figures")
    main(trained)
    redone = [line for line in capsys.readouterr().out.splitlines() if not line.endswith("is up to date")]
    assert redone == ["report: report", f"report: {report}"] and list((report.parent / "figures").iterdir())

    trained.analysis.owner.max_nu_error = 0.1
    main(trained)
    redone = [line for line in capsys.readouterr().out.splitlines() if not line.endswith("is up to date")]
    assert redone[0] == f"{folder.name}: latents" and redone[-2:] == ["report: report", f"report: {report}"]


@pytest.mark.usefixtures("key")
def test_what_a_study_will_cost_is_said_before_anything_is_paid(trained: AnalysisSettings) -> None:
    trained.analysis.scoring.judge, record = MODEL, folders_of(trained)[1] / "latents.json"
    with MessagesStub(answer=by_prompt) as stub:
        llm = trained.analysis.llm = config(stub, max_usd=0.001)
        with pytest.raises(BadInput, match=r"language models: about \d+ questions on 3 latents"):
            main(trained)  # of offline descriptions, which are free and there by now
        assert record.with_name("categorise.json").exists()
        trained.analysis.annotate.annotator = "llm"
        with pytest.raises(BadInput, match="language models: about 18 questions on 3 latents"):
            main(trained)
        assert record.exists() and not stub.bodies
        llm.max_usd = 10.0
        main(trained)
        num_asked, done = len(stub.bodies), record.read_bytes()
        assert num_asked >= 6
        llm.base_url = "http://127.0.0.1:9"  # where nobody listens: a finished study does not ask
        main(trained)
        trained.analysis.owner.max_nu_error = 0.5  # gives both models more latents
        with pytest.raises(BadInput, match="does not answer"):
            main(trained)
        assert record.read_bytes() == done  # said before the pass
        llm.base_url, llm.max_usd = stub.url, 0.001
        with pytest.raises(BadInput, match="language models: about 18 questions on 6 latents"):
            main(trained)
        assert record.read_bytes() != done
        with pytest.raises(BadInput, match="language models: about 18 questions on 6 latents"):
            main(trained)  # again, though the pass is done
        assert len(stub.bodies) == num_asked


def test_without_a_crosscoder(study: list[str]) -> None:
    settings = compose(AnalysisSettings, [*study, *TRAINING])
    with pytest.raises(BadInput, match=r"manifest.json is missing. Run `python -m extract.tokens experiment=pair"):
        main(settings)
    make_tokens(settings)
    extract(settings)
    with pytest.raises(BadInput, match=r"python -m train experiment=pair.*crosscoder\.k=4"):
        main(settings)
    assert not (Path(settings.outputs) / "analysis").exists()


def test_a_job_that_is_requeued_without_a_finished_step_in_between_is_refused(
    study: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compose(AnalysisSettings, [*study, *TRAINING, "max_restarts_without_progress=0"])
    step = Path(settings.outputs) / "analysis" / "base_tuned" / "latents.json"
    monkeypatch.setenv("SLURM_JOB_ID", "5")

    def start(restart: int, message: str) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        with pytest.raises(BadInput, match=message):
            main(settings)

    start(0, "manifest.json is missing")
    step.parent.mkdir(parents=True)
    step.write_text("{}")
    start(1, "manifest.json is missing")
    step.write_text("{ }")  # done again, as after another training
    start(2, "manifest.json is missing")
    start(3, "Job 5 began 1 times at the end of base_tuned: latents .*max_restarts_without_progress=0")
    state = step.parent / "pass" / "0123" / STATE_FILE
    state.parent.mkdir(parents=True)
    state.write_text("further")
    start(4, "manifest.json is missing")  # within a pass, too, there is progress
    start(5, "Job 5 began 1 times at a state of base_tuned: latents .*max_restarts_without_progress=0")


def test_the_report_covers_the_finished_pairs_of_the_same_overrides(tmp_path: Path) -> None:
    for name in ("a_b", "a_c,seed=1", "b_c", "a_b,seed=1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "categorise.json").write_text("{}")
    (tmp_path / "a_d").mkdir()  # not finished
    pairs = {pair: pair.split("_") for pair in ("a_b", "a_c", "a_d", "b_c")}
    settings = AnalysisSettings(pair="a_b", pairs=pairs)
    assert analysed_folders(settings, tmp_path / "a_b") == [tmp_path / "a_b", tmp_path / "b_c"]
    assert analysed_folders(settings, tmp_path / "a_b,seed=1") == [tmp_path / "a_b,seed=1", tmp_path / "a_c,seed=1"]


def test_the_command_reports_what_is_missing_in_one_line(study: list[str]) -> None:
    command = [sys.executable, "-m", "analysis", *study]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "python -m extract.tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
