"""A leaderboard is read and validated; its changes stand beside those of latents, and how they agree is by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.compare.beside import beside, rows_of
from analysis.compare.changes import Comparison
from analysis.compare.config import CompareConfig
from analysis.compare.counts import Counts
from analysis.compare.leaderboard import read_leaderboard
from analysis.compare.pairwise import compare_counts
from extract.errors import BadInput

NAMES = ["Safety", "Code", "Writing", "Language"]
HEADER = "category,model,elo,elo_low,elo_high,style_control,taxonomy\n"
BOARD = HEADER + (
    "coding,it,1200,1190,1206,no,Code\n"
    "coding,simpo,1240,1232,1247,no,Code\n"
    "coding,it,1205,1195,1215,yes,\n"
    "coding,simpo,1195,1187,1203,yes,\n"
    "creative writing,it,1210,,,no,Writing\n"
    "creative writing,simpo,1260,,,no,Writing\n"
    "language,it,1190,,,no,\n"
    "language,simpo,1180,,,no,\n"
    "overall,it,1200,,,no,\n"
    "overall,simpo,1230,,,no,\n"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def comparisons(counts: dict[str, list[int]] | None = None) -> list[Comparison]:
    by_name = counts or {"Safety": [5, 5], "Code": [4, 9], "Writing": [6, 8], "Language": [9, 4]}
    return compare_counts(Counts("category", ["it", "simpo"], by_name, [100, 80]), CompareConfig(resamples=50))


def test_categories_stand_beside_names_by_column_setting_or_equal_name(tmp_path: Path) -> None:
    board = read_leaderboard(write(tmp_path / "b.csv", BOARD), {}, NAMES)
    assert board.name_of == {"coding": "Code", "creative writing": "Writing", "language": "Language"}
    assert board.models == ["it", "simpo"]
    assert board.ratings["coding", True]["simpo"].value == 1195
    mapped = read_leaderboard(tmp_path / "b.csv", {"overall": "Safety", "coding": "Writing"}, NAMES)
    assert mapped.name_of["overall"] == "Safety" and mapped.name_of["coding"] == "Writing"


def test_elo_beside_shares_by_hand(tmp_path: Path) -> None:
    board = read_leaderboard(write(tmp_path / "b.csv", BOARD), {}, NAMES)
    coding, controlled, writing, language = rows_of(board, "it", "simpo", comparisons())
    assert (coding.elo_difference, controlled.elo_difference, writing.elo_difference) == (40, -10, 50)
    # Down as far as simpo's lower and it's upper end, up as far as the other two.
    assert coding.elo_difference_low == pytest.approx(40 - math.hypot(1240 - 1232, 1206 - 1200))
    assert coding.elo_difference_high == pytest.approx(40 + math.hypot(1247 - 1240, 1200 - 1190))
    # -10 +- sqrt(8^2 + 10^2) holds 0, and without an interval nothing is known.
    assert coding.elo_differs and not controlled.elo_differs and not writing.elo_differs
    assert math.isnan(writing.elo_difference_low)
    assert coding.difference == pytest.approx(9 / 80 - 4 / 100)
    # Code rises with Elo, and against it with style control; Writing rises, Language falls, both with Elo.
    assert [row.direction for row in (coding, controlled, writing, language)] == ["agree", "differ", "agree", "agree"]


def test_agreement_is_stated_with_its_tests_and_caveat(tmp_path: Path) -> None:
    board = read_leaderboard(write(tmp_path / "b.csv", BOARD), {}, NAMES)
    ((table, said),) = beside(board, comparisons())
    # Three of three: p = 2 / 8. Elo 40, 50, -10 and shares +7.25, +4, -4 rank 2 3 1 and 3 2 1: rho = 0.5.
    assert (
        "Without style control 3 of 3 categories change in the direction of Elo (44\u00a0% to 100\u00a0%, p = 0.25)"
        in said
    )
    certain = "; of those where the interval of Elo's difference excludes 0"
    assert f"{certain}, 1 of 1; rank correlation +0.50 (p = 1.00)" in said
    assert "With style control 0 of 1 categories" in said and f"{certain}, none." in said
    assert "May not be claimed: that latents explain the Elo of it or simpo. The evidence is 3 categories" in said
    assert table.name == "leaderboard_it_simpo" and table.raw[0][0] == "coding"
    assert table.printed[0][:6] == ["coding", "no", "1200", "1240", "+40", "[+30, +52]"]  # 8 and 6 down, 7 and 10 up
    assert [row[6] for row in table.printed] == ["yes", "no", "–", "–"] and table.printed[2][5] == "–"
    assert len(table.heading) == len(table.printed[0])


def test_level_categories_decide_nothing(tmp_path: Path) -> None:
    text = HEADER + "x,it,1200,,,no,Safety\nx,simpo,1210,,,no,Safety\n"
    board = read_leaderboard(write(tmp_path / "b.csv", text), {}, NAMES)
    ((_, said),) = beside(board, comparisons({"Safety": [5, 4], "Code": [0, 0]}))  # 5 % of either
    assert said.startswith("Without style control no category changes in both.")


@pytest.mark.parametrize(
    ("text", "mapping", "problem"),
    [
        ("", {}, "first line is empty. It must name category, model, elo"),
        ("category,model\n", {}, "It must name category, model, elo"),
        ("category,model,elo,rank\n", {}, "may name elo_low"),
        ("category,model,elo,elo\n", {}, "each once"),
        (HEADER, {}, "has no ratings"),
        (HEADER + "x,it,high,,,no,\n", {}, "line 2: could not convert string to float: 'high'"),
        (HEADER + "x,it,,,,no,\n", {}, r"line 2: elo \(\) must be a number"),
        (HEADER + "x,it,inf,,,no,\n", {}, r"elo \(inf\) must be a number"),
        (HEADER + "x,it,1200,1210,1220,no,\n", {}, r"elo_low \(1210\) and elo_high \(1220\) must enclose elo \(1200\)"),
        (HEADER + "x,it,1200,1190,,no,\n", {}, "must enclose elo"),
        (HEADER + "x,it,1200,-inf,inf,no,\n", {}, r"elo_low \(-inf\) and elo_high \(inf\) must enclose"),
        (HEADER + "x,it,1200,1190,inf,no,\n", {}, "must enclose elo"),
        (HEADER + f"{'x' * 200_000},it,1200,,,no,\n", {}, "line 2, is no CSV: field larger"),
        (HEADER + "\n\nx,it,high,,,no,\n", {}, "line 4: could not convert"),
        (HEADER + "x,it,1200,,,maybe,\n", {}, r"style_control \(maybe\) be yes or no"),
        (HEADER + ",it,1200,,,no,\n", {}, "category and model must be named"),
        (HEADER + "x,it,1200,,,no,\nx,it,1300,,,,\n", {}, "line 3: it has a second rating in 'x'"),
        (HEADER + "x,it,1200,,,no,Safety\nx,dpo,1300,,,no,Code\n", {}, "line 3: 'x' is 'Safety' above and 'Code' here"),
        (
            HEADER + "x,it,1200,,,no,Safty\n",
            {},
            "'x' is set beside 'Safty', which the taxonomy lacks. Did you mean 'Safety'",
        ),
        (HEADER + "x,it,1200,,,no,,,\n", {}, "line 2 has more than 7 cells"),
        (BOARD, {"maths": "Code"}, "leaderboard_map.maths: .* has no such category. It has coding"),
        (BOARD, {"overall": "Sums"}, "'overall' is set beside 'Sums'"),
    ],
)
def test_bad_leaderboards_are_named(tmp_path: Path, text: str, mapping: dict[str, str], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        read_leaderboard(write(tmp_path / "b.csv", text), mapping, NAMES)


def test_a_leaderboard_of_other_models_or_categories_is_refused(tmp_path: Path) -> None:
    other = read_leaderboard(write(tmp_path / "b.csv", BOARD.replace("simpo", "gemma-simpo")), {}, NAMES)
    with pytest.raises(
        BadInput, match=r"rates it, gemma-simpo, and no category two of the compared models \(it, simpo\)"
    ):
        beside(other, comparisons())
    unmapped = read_leaderboard(write(tmp_path / "c.csv", "category,model,elo\nx,it,1\nx,simpo,2\n"), {}, NAMES)
    with pytest.raises(BadInput, match="none of x stands beside a compared category"):
        beside(unmapped, comparisons())
    with pytest.raises(BadInput, match=r"leaderboard \(.*nothing.csv\) is not a file"):
        read_leaderboard(tmp_path / "nothing.csv", {}, NAMES)


def test_the_command_shows_and_writes_it(tmp_path: Path) -> None:
    text = "category,model,elo,style_control,taxonomy\n" + "".join(
        f"coding,{model},{elo},{style},Specialized Capabilities\n"
        for style, elos in (("no", (1200, 1250)), ("yes", (1200, 1190)))
        for model, elo in zip(("it", "SimPO"), elos, strict=True)
    )
    board = write(tmp_path / "board.csv", text)
    command = [sys.executable, "-m", "analysis.compare", "counts=analysis/published/classes.csv", "resamples=100"]
    done = subprocess.run(
        [*command, f"leaderboard={board}", f"outputs={tmp_path / 'o'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "With style control 1 of 1 categories change in the direction of Elo" in done.stdout
    assert {path.name for path in (tmp_path / "o").glob("leaderboard*")} == {
        "leaderboard_it_SimPO.csv",
        "leaderboard_it_SimPO.tex",
        "leaderboard_it_SimPO.txt",
    }
