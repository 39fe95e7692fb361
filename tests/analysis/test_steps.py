"""What is done, skipped and done again."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.scoring.agreeing import people_folder
from analysis.scoring.people import DOCUMENTS, LATENTS, add_said
from analysis.scoring.sheets import KEY, Filled
from analysis.steps import (
    Step,
    command_line,
    inputs_of_latents,
    is_done,
    record_of,
    run_steps,
    sha256_of,
    steps_of_pair,
    steps_of_study,
)
from analysis.taxonomy.step import categorise
from extract.errors import BadInput
from tests.analysis.made_study import make_study
from train.crosscoder import CONFIG_FILE, WEIGHTS_FILE


def two_steps(folder: Path, done: list[str], threshold: float = 0.5) -> list[Step]:
    """`count` copies the length of source.txt, `judge` reads what `count` wrote."""

    def count() -> None:
        done.append("count")
        (folder / "count.txt").write_text(str(len((folder / "source.txt").read_text())))

    def judge() -> None:
        done.append("judge")
        (folder / "judge.txt").write_text(str(int((folder / "count.txt").read_text()) > threshold))

    return [
        Step("count", {}, {"source": folder / "source.txt"}, ("count.txt",), count),
        Step("judge", {"threshold": threshold}, {"count": folder / "count.txt"}, ("judge.txt",), judge),
    ]


def ran(folder: Path, threshold: float = 0.5) -> list[str]:
    done: list[str] = []
    run_steps(two_steps(folder, done, threshold), folder)
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source.txt").write_text("abc")
    assert ran(tmp_path) == ["count", "judge"]
    return tmp_path


def test_a_second_run_skips_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert ran(folder) == []
    said = [f"{folder.name}: {name} is up to date" for name in ("count", "judge")]
    assert capsys.readouterr().out.splitlines() == said


def test_a_changed_setting_redoes_its_step_alone(folder: Path) -> None:
    assert ran(folder, threshold=5.0) == ["judge"]
    assert (folder / "judge.txt").read_text() == "False"


def test_a_changed_input_redoes_what_depends_on_it(folder: Path) -> None:
    (folder / "source.txt").write_text("abcdef")
    assert ran(folder) == ["count", "judge"]


def test_equal_outputs_stop_the_chain(folder: Path) -> None:
    (folder / "source.txt").write_text("xyz")
    assert ran(folder) == ["count"]


def test_a_deleted_output_or_record_is_made_again(folder: Path) -> None:
    (folder / "count.txt").unlink()
    assert ran(folder) == ["count"]
    (folder / "judge.json").unlink()
    assert ran(folder) == ["judge"]


def test_an_output_that_was_cut_off_is_made_again(folder: Path) -> None:
    (folder / "judge.txt").write_text("Tr")
    assert ran(folder) == ["judge"] and (folder / "judge.txt").read_text() == "True"


def test_a_half_written_record_is_no_record(folder: Path) -> None:
    (folder / "count.json").write_text((folder / "count.json").read_text()[:20])
    assert ran(folder) == ["count"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_before_it_writes_leaves_what_was_done(folder: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        assert not (folder / "count.json").exists()  # nobody may take it for done should the process die
        raise error

    step = Step("count", {"new": 1}, {"source": folder / "source.txt"}, ("count.txt",), fail)
    with pytest.raises(error):
        run_steps([step], folder)
    assert ran(folder) == []


def test_a_step_that_fails_while_it_writes_is_not_done(folder: Path) -> None:
    def fail() -> None:
        (folder / "count.txt").write_text("9")  # as long as before
        raise RuntimeError("disk on fire")

    step = Step("count", {"new": 1}, {"source": folder / "source.txt"}, ("count.txt",), fail)
    with pytest.raises(RuntimeError):
        run_steps([step], folder)
    assert not (folder / "count.json").exists()
    assert ran(folder) == ["count"]


def test_a_replaced_file_in_a_folder_counts_as_written(folder: Path) -> None:
    (folder / "tables" / "deep").mkdir(parents=True)
    (folder / "tables" / "deep" / "a.csv").write_text("1")

    def work() -> None:
        if fails:
            (folder / "tables" / "deep" / "a.csv").write_text("2")
            raise RuntimeError("disk on fire")

    fails = False
    step = Step("draw", {}, {}, ("tables",), work)
    assert run_steps([step], folder) and not run_steps([step], folder)
    fails = True
    with pytest.raises(RuntimeError):
        run_steps([replace(step, settings={"new": 1})], folder)
    assert not (folder / "draw.json").exists()


def test_the_record_names_settings_and_hashes(folder: Path) -> None:
    record = json.loads((folder / "judge.json").read_text())
    # printf 3 | sha256sum
    count = "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce"
    outputs = {"judge.txt": len("True")}
    assert record == {"step": "judge", "settings": {"threshold": 0.5}, "inputs": {"count": count}, "outputs": outputs}
    step = two_steps(folder, [])[1]
    assert is_done(step, record_of(step), folder / "judge.json")


def test_files_of_an_earlier_format_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their settings and inputs may be those of today."""
    settings = AnalysisSettings(hookpoint="block3", store=str(tmp_path), pairs={"p": ["base", "tuned"]})
    for name in ("tokens", "activations/base/block3", "activations/tuned/block3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / name).write_text("{}")
    before = record_of(steps_of_pair(settings, tmp_path, tmp_path)[0])
    monkeypatch.setattr("analysis.steps.FORMAT_VERSION", 2)
    assert record_of(steps_of_pair(settings, tmp_path, tmp_path)[0]) != before


def test_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.txt is missing"):
        sha256_of(tmp_path / "absent.txt")


def categorised_study(root: Path) -> tuple[AnalysisSettings, list[Path]]:
    """The made study with offline categories."""
    settings, folders = make_study(root)
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.resamples = settings.analysis.agreement.resamples = 50
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    return settings, folders


def redone(steps: list[Step], folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The steps of a run that were not up to date; a run after it repeats none of them."""
    capsys.readouterr()
    run_steps(steps, folder)
    lines = capsys.readouterr().out.splitlines()
    assert not run_steps(steps, folder)
    started = {f"{folder.name}: {step.name}": step.name for step in steps}
    return [started[line] for line in lines if line in started]


def test_a_deleted_figure_or_table_of_any_name_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, folders = categorised_study(tmp_path)
    board = tmp_path / "elo.csv"
    names = ("Format & Structure Control", "Specialized Capabilities")
    rows = [f"{name},{model},1200" for name in names for model in ("simpo", "dpo")]
    board.write_text("\n".join(["category,model,elo", *rows]))
    settings.analysis.compare.leaderboard = str(board)
    steps, target = steps_of_study(settings, folders), tmp_path / "report"
    assert redone(steps, target, capsys) == ["compare", "agreement", "report"]
    (target / "figures" / "flow.pdf").unlink()
    assert redone(steps, target, capsys) == ["report"]
    lost = [target / "tables" / name for name in ("class_simpo_dpo.txt", "leaderboard_simpo_dpo.csv")]
    for path in lost:
        path.unlink()
    assert redone(steps, target, capsys) == ["compare"]
    assert all(path.is_file() for path in lost)


def test_a_damaged_record_of_written_files_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it says to do mends it."""
    settings, folders = categorised_study(tmp_path)
    steps, record = steps_of_study(settings, folders)[:1], tmp_path / "report" / "compare_files.json"
    run_steps(steps, tmp_path / "report")
    whole = record.read_bytes()
    for text in (b"", whole.replace(b"[", b" ")):
        record.write_bytes(text)
        with pytest.raises(BadInput, match=r"compare_files\.json cannot be read .* Remove it and run"):
            run_steps(steps, tmp_path / "report")
    record.unlink()
    assert redone(steps, tmp_path / "report", capsys) == ["compare"] and record.read_bytes() == whole


def test_what_people_said_is_read_by_both_agreements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, folders = categorised_study(tmp_path)
    settings.store, settings.pair = str(tmp_path), "base_simpo"
    manifests = [settings.activations_folder(member, "block15") for member in ("base", "simpo")]
    for path in (settings.tokens_folder / "manifest.json", *(manifest / "manifest.json" for manifest in manifests)):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / name).write_text("{}")

    def run() -> list[str]:
        of_pair = redone(steps_of_pair(settings, tmp_path, folders[0])[-1:], folders[0], capsys)
        return of_pair + redone(steps_of_study(settings, folders)[:2], tmp_path / "report", capsys)

    run()
    units = {LATENTS: ("base_simpo", "300"), DOCUMENTS: ("base_simpo", "300", "1")}
    for unit, named in units.items():
        said = people_folder(settings, unit) / "anna.csv"
        for answer in ("other", "Minor Protection") if unit == LATENTS else ("yes", "no"):  # the second one, anew
            add_said(said, [Filled(named, answer)])
            assert run() == ["score", "agreement"]
    said = people_folder(settings, LATENTS) / "anna.csv"
    assert "people" in (folders[0] / "agreement.csv").read_text()
    said.rename(said.with_name("sheet.0123" + KEY))  # a key is no answer
    assert run() == ["score", "agreement"]
    for folder in (tmp_path / "analysis", folders[0]):
        assert "people" not in (folder / "agreement.csv").read_text()


def test_agreement_reads_what_it_is_of_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, folders = categorised_study(tmp_path)
    target = tmp_path / "report"
    redone(steps_of_study(settings, folders)[:2], target, capsys)
    (folders[0] / "human.jsonl").write_text("")
    settings.analysis.compare.human_labels = True
    assert redone(steps_of_study(settings, folders)[:2], target, capsys) == ["compare"]
    (folders[0] / "verdicts.csv").write_text("latent,kind,control,document,truth,positives,given,verdict\n")
    assert redone(steps_of_study(settings, folders)[:2], target, capsys) == ["agreement"]


def test_a_deleted_table_of_the_comparison_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.resamples = 50
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)

    def lines() -> list[str]:
        run_steps(steps_of_study(settings, folders)[:1], tmp_path / "report")
        return capsys.readouterr().out.splitlines()

    assert lines() == ["report: compare"]
    assert lines() == ["report: compare is up to date"]
    table = tmp_path / "report" / "tables" / "class_simpo_dpo.tex"
    before = table.read_bytes()
    table.unlink()
    assert lines() == ["report: compare"]
    assert table.read_bytes() == before


def test_what_people_said_and_a_leaderboard_are_read_by_the_comparison(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    config = settings.analysis.compare
    (folders[0] / "human.jsonl").write_text("")
    assert not {"base_simpo/human.jsonl", "leaderboard"} & set(steps_of_study(settings, folders)[0].inputs)
    config.human_labels, config.leaderboard = True, str(tmp_path / "elo.csv")
    inputs = steps_of_study(settings, folders)[0].inputs
    assert inputs["base_simpo/human.jsonl"] == folders[0] / "human.jsonl" and "base_dpo/human.jsonl" not in inputs
    assert inputs["leaderboard"] == tmp_path / "elo.csv"


OVERRIDES = ["experiment=demo", "hookpoint=block3", "crosscoder.k=8", "training.lr=1e-3", "analysis.tags.min_f1=0.5"]


@pytest.mark.parametrize(
    ("present", "missing", "command"),
    [
        ([], "tokens/manifest.json", "python -m extract.tokens experiment=demo hookpoint=block3"),
        (["tokens"], "tuned/block3/manifest.json", "python -m extract.activations experiment=demo hookpoint=block3"),
        (
            ["tokens", "activations/base/block3", "activations/tuned/block3"],
            "config.json",
            "python -m train experiment=demo hookpoint=block3 crosscoder.k=8 training.lr=1e-3",
        ),
    ],
)
def test_the_first_missing_stage_is_named_with_its_command(
    tmp_path: Path, present: list[str], missing: str, command: str
) -> None:
    for name in present:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    pairs = {"p": ["base", "tuned"]}
    settings = AnalysisSettings(hookpoint="block3", store=str(tmp_path), pairs=pairs, composed_from=OVERRIDES)
    with pytest.raises(BadInput) as caught:
        inputs_of_latents(settings, tmp_path / "crosscoder")
    assert missing in str(caught.value) and f"Run `{command}` first" in str(caught.value)


def test_who_trained_online_is_told_that_the_analysis_reads_a_store(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    pairs, overrides = {"p": ["base", "tuned"]}, [*OVERRIDES, "data=online"]
    settings = AnalysisSettings(hookpoint="block3", store=str(tmp_path), pairs=pairs, composed_from=overrides)
    settings.data.mode = "online"
    command = "`python -m extract.activations experiment=demo hookpoint=block3`"
    with pytest.raises(BadInput, match=f"{command} first. Unlike training with data=online, .*store=PATH"):
        inputs_of_latents(settings, tmp_path / "crosscoder")


def test_command_line_keeps_what_a_command_knows() -> None:
    overrides = ["engine=fsdp", "analysis.device=cpu", "seed=1"]
    assert command_line("train", overrides) == "python -m train engine=fsdp seed=1"


def test_a_file_is_hashed_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files of one size and time the second is another one."""
    path, num_read = tmp_path / "file", 0
    digest = hashlib.file_digest

    def count(file: BinaryIO, name: str) -> Any:
        nonlocal num_read
        num_read += 1
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", count)
    for content in (b"a", b"b"):
        (tmp_path / content.decode()).write_bytes(content)
        os.utime(tmp_path / content.decode(), (1, 1))
        (tmp_path / content.decode()).rename(path)
        assert {sha256_of(path) for _ in range(3)} == {hashlib.sha256(content).hexdigest()}
    assert num_read == 2
