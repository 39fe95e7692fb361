"""Which models are compared, what may be claimed of them, and bad files of counts."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.annotate.step import annotate
from analysis.compare.changes import Change, Comparison
from analysis.compare.command import compare_file, counts_settings, default_folder, show
from analysis.compare.config import CompareConfig
from analysis.compare.counts import read_counts
from analysis.compare.pairwise import compare_counts, pairs_of_models
from analysis.compare.step import check_reference, compare, comparisons_of, outputs_of
from analysis.taxonomy.step import categorise, load_taxonomy
from extract.errors import BadInput
from tests.analysis.made_study import make_study

CONFIG = CompareConfig(resamples=2000)


def write_counts(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def compared(path: Path, config: CompareConfig = CONFIG) -> list[Comparison]:
    return [one for counts in read_counts(path, load_taxonomy()) for one in compare_counts(counts, config)]


def change_named(comparison: Comparison, name: str) -> Change:
    return next(change for change in comparison.changes if change.name == name)


def test_a_true_difference_is_claimed_and_the_rest_is_not(tmp_path: Path) -> None:
    rows: list[list[object]] = [["one", 5, 60], ["two", 50, 48], ["unclassified", 145, 92]]
    (comparison,) = compared(write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows))
    assert comparison.claim.startswith("May be claimed (Fisher exact tests corrected for 2 categories): one more")
    assert "one more frequent in b (5 of 200 against 60 of 200" in comparison.claim
    assert "two" not in comparison.claim
    # Of 2,000 permutations of so unequal rows none is as extreme: p = 1 / 2,001.
    assert (
        "145 and 92 latents in none of them included: p < 0.001, so that a difference as a whole may be claimed."
        in (comparison.claim)
    )
    one, two = comparison.changes
    assert one.may_be_claimed and not two.may_be_claimed
    assert one.claim.startswith("May be claimed: the share of b is larger (60 of 200 against 5 of 200")
    assert "nor that b is better at it" in one.claim
    assert two.claim.startswith("May not be claimed: that b has more or less of it (48 of 200 against 50 of 200")


def test_all_comparisons_are_corrected_together(tmp_path: Path) -> None:
    rows: list[list[object]] = [["x", 2, 14, 3], ["y", 20, 20, 25], ["unclassified", 78, 66, 72]]
    path = write_counts(tmp_path / "c.csv", ["category", "a", "b", "c"], rows)
    b, c = compared(path)
    pvalues = sorted(change.p for one in (b, c) for change in one.changes)
    smallest = change_named(b, "x")
    # The smallest of four p: q = 4 p.
    assert smallest.p == pvalues[0] and smallest.q == pytest.approx(4 * pvalues[0])
    assert "corrected for 4 tests: 2 categories in 2 comparisons" in b.claim
    assert b.global_p_of_all == c.global_p_of_all and "all compared models are alike" in c.claim


def test_a_category_without_a_row_counts_as_a_test(tmp_path: Path) -> None:
    rows: list[list[object]] = [["Creative Generation", 5, 18], ["unclassified", 195, 182]]
    (comparison,) = compared(write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows))
    (change,) = comparison.changes
    assert comparison.num_names == 30 and 0.001 < change.p < 0.02 and change.q == pytest.approx(30 * change.p)


def test_which_models_are_compared() -> None:
    models = ["it", "simpo", "dpo"]
    assert pairs_of_models(models, CompareConfig()) == [("it", "simpo"), ("it", "dpo")]
    assert pairs_of_models(models, CompareConfig(reference="dpo")) == [("dpo", "it"), ("dpo", "simpo")]
    every = [("it", "simpo"), ("it", "dpo"), ("simpo", "dpo")]
    assert pairs_of_models(models, CompareConfig(every_pair=True)) == every
    with pytest.raises(BadInput, match=r"reference \(sipmo\) is none of the compared models: it, simpo, dpo"):
        check_reference(models, "sipmo")


def test_counts_alone_say_what_they_do_not_know(tmp_path: Path) -> None:
    rows: list[list[object]] = [["x", 1, 1], ["unclassified", 3, 0]]
    (comparison,) = compared(write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows))
    assert comparison.caveat.startswith("Near-duplicates and repeated annotations are unknown from counts alone")
    # Unclassified latents count towards the totals alone.
    assert [change.name for change in comparison.changes] == ["x"]
    assert (comparison.changes[0].share_a, comparison.changes[0].share_b) == (0.25, 1.0)


def test_the_largest_files_are_compared_in_seconds(tmp_path: Path) -> None:
    """100,000 latents a side are counted and drawn by their numbers, not laid out 10,000 times."""
    rows: list[list[object]] = [["x", 9_000, 9_100], ["unclassified", 91_000, 90_900]]
    path = write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows)
    started = time.monotonic()
    (comparison,) = compared(path, CompareConfig())
    # Laid out, 10,000 permutations of 200,000 latents take a minute.
    assert time.monotonic() - started < 30
    assert comparison.global_p == pytest.approx(comparison.changes[0].p, abs=0.03)


def test_every_file_has_its_folder() -> None:
    assert default_folder(Path("analysis/published/classes.csv")) == Path("outputs/compare/analysis/published/classes")
    assert default_folder(Path("/some/where/classes.csv")) == Path("outputs/compare/some/where/classes")
    assert default_folder(Path("../classes.txt")) == Path(
        "outputs/compare", *Path.cwd().parent.parts[1:], "classes.txt"
    )


def test_tables_of_earlier_settings_go_and_other_files_stay(tmp_path: Path) -> None:
    path = write_counts(tmp_path / "c.csv", ["category", "a", "b", "c"], [["Mine", 3, 4, 5], ["Yours", 5, 4, 3]])
    settings = [f"counts={path}", f"outputs={tmp_path / 'o'}", "resamples=50"]
    compare_file([*settings, "every_pair=true"])
    (tmp_path / "o" / "notes.csv").write_text("mine")
    assert (tmp_path / "o" / "category_a_b.csv").exists()
    compare_file([*settings, "reference=c"])
    pairs = {f"{kind}category_c_{other}" for kind in ("", "changes_") for other in "ab"}
    assert {file.stem for file in (tmp_path / "o").glob("*.csv")} == {*pairs, "comparisons", "notes"}


def test_names_of_another_taxonomy_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_counts(tmp_path / "c.csv", ["category", "a", "b"], [["mine", 5, 6], ["yours", 2, 3]])
    compare_file([f"counts={path}", f"outputs={tmp_path / 'o'}", "resamples=50"])
    assert "No row is in the taxonomy: the tests are corrected for the 2 names" in capsys.readouterr().out


def test_only_pairs_that_share_a_base_are_compared(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.resamples = 200
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    comparisons = compare(settings, folders, tmp_path / "report")
    assert [(c.level, c.model_a, c.model_b) for c in comparisons] == [
        ("class", "simpo", "dpo"),
        ("category", "simpo", "dpo"),
    ]
    assert comparisons[0].totals == (3, 2)  # planted latents
    assert comparisons[0].basis.selected == (3, 2) and comparisons[0].basis.num_votes == 1
    assert comparisons[0].annotator == comparisons[1].annotator == "offline (n-grams), category by TF-IDF"
    tables = tmp_path / "report" / "tables"
    for name in ("category_simpo_dpo", "class_simpo_dpo"):
        assert "Annotator: offline (n-grams), category by TF-IDF." in (tables / f"{name}.txt").read_text()
        with (tables / f"{name}.csv").open(newline="") as file:
            assert {row["annotator"] for row in csv.DictReader(file)} == {comparisons[0].annotator}
    names = [f"{kind}{level}_simpo_dpo" for kind in ("", "certain_", "changes_") for level in ("category", "class")]
    files = {f"{name}.{ending}" for name in [*names, "comparisons", "flow"] for ending in ("csv", "tex")}
    assert {path.name for path in tables.iterdir()} == files | {f"{name}.txt" for name in names}
    config = settings.analysis.compare
    assert set(outputs_of(config, folders)) == {f"tables/{name}" for name in files}
    own = {"owners.csv", "class_simpo_notes.csv", "leaderboard_a_b.tex"}
    for name in own:
        (tables / name).write_text("not of a comparison")
    compare(settings, folders[:1], tmp_path / "report")
    assert {path.name for path in tables.iterdir()} == own | {"flow.csv", "flow.tex"}
    assert comparisons_of(settings, folders[:1]) == []
    assert outputs_of(config, folders[:1]) == ("tables/flow.csv", "tables/flow.tex")


def test_the_terminal_shows_names_with_latents_and_each_caveat_once(tmp_path: Path) -> None:
    rows: list[list[object]] = [["seen", 5, 6], ["unseen", 0, 0]]
    comparisons = compared(write_counts(tmp_path / "c.csv", ["category", "a", "b"], rows))
    text = show(comparisons * 2, [])
    assert "seen" in text and "unseen" not in text
    assert text.count(comparisons[0].claim) == 2 and text.count(comparisons[0].caveat) == 1


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("reasmples=200", "reasmples=200 is not a setting. Did you mean 'resamples'.*counts=FILE: .*resamples"),
        ("every_pair", "every_pair has no value. Settings are name=value"),
        ("confidence=x", "confidence: Value 'x' .* could not be converted to Float"),
        ("taxonomy=none.yaml", r"^taxonomy \(none.yaml\) is not a file"),
        ("confidence=95", r"confidence \(95.0\) must lie between 0 and 1"),
        ("seed=-1", r"^seed \(-1\) must be at least 0"),
        ("resamples=0", r"resamples \(0\) must be at least 1"),
        ("power=1", r"power \(1.0\)"),
        ("power=0.05", r"power \(0.05\) must exceed 1 - confidence \(0.05\)"),
        ("counts=", "counts= names no file"),
        ("human_labels=true", "human_labels=true needs the latents of a study"),
        ("leaderboard=none.csv", r"leaderboard \(none.csv\) is not a file"),
        ("leaderboard_map.coding=x", "Give it: leaderboard=FILE"),
    ],
)
def test_settings_that_cannot_be_used(argument: str, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        counts_settings(["counts=x.csv", argument])


def test_the_reference_goes_with_one_model_each() -> None:
    with pytest.raises(BadInput, match=r"reference \(it\) means nothing with every_pair=true"):
        counts_settings(["counts=x.csv", "reference=it", "every_pair=true"])


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "analysis.compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_needs_no_experiment_for_a_file(tmp_path: Path) -> None:
    output = f"outputs={tmp_path / 'o'}"
    done = run_command("counts=analysis/published/classes.csv", output, "resamples=200", "every_pair=true")
    assert done.returncode == 0, done.stderr
    assert "6.25\u00a0%" in done.stdout and "may not be claimed" in done.stdout
    assert {path.stem for path in (tmp_path / "o").glob("class_*.tex")} == {
        "class_it_DPO",
        "class_it_SimPO",
        "class_SimPO_DPO",
    }
    wrong = run_command("counts=analysis/published/classes.csv", output, "reasmples=200")
    assert wrong.returncode == 2
    assert "reasmples" in wrong.stderr and "resamples" in wrong.stderr and "Traceback" not in wrong.stderr


def test_one_side_alone_is_refused(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folders[0])
    categorise(settings, folders[0])
    done = run_command("experiment=demo/base_simpo", f"outputs={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "one side alone" in done.stderr and "base_simpo: base -> simpo" in done.stderr
