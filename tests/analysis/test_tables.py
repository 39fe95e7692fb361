"""What is printed, and that nothing in it is taken for a command."""

from __future__ import annotations

import csv
import io
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.tables import (
    Table,
    bounded,
    csv_of,
    escape_latex,
    interval,
    latex_of,
    number,
    percent,
    probability,
    signed,
    stated,
    text_of,
    write_table,
)

RAW, PRINTED = [["a,b", 0.1 + 0.2], ['q"', None]], [["a_b", "30"], ["~", "–"]]
TABLE = Table("t", "A & B", ["name", "x"], RAW, ["name", "x (%)"], PRINTED)


def test_csv_keeps_full_precision_and_quotes() -> None:
    rows = list(csv.reader(io.StringIO(csv_of(TABLE))))
    assert rows == [["name", "x"], ["a,b", repr(0.1 + 0.2)], ['q"', ""]]


def test_latex_escapes_every_special_character() -> None:
    assert escape_latex("\\ { } & % $ # _ ~ ^") == (
        r"\textbackslash{} \{ \} \& \% \$ \# \_ \textasciitilde{} \textasciicircum{}"
    )
    assert escape_latex("a\nb") == "a b"


def test_latex_has_no_control_characters_and_no_more_rows_than_a_page() -> None:
    assert escape_latex("a\r\n b\t\x07c\u2028d\u0085e\u00a0f") == "a b c d e~f"
    long = Table("many", "A lot.", ["x"], [[i] for i in range(300)], ["x"], [[f"row {i}"] for i in range(300)])
    text = latex_of(long)
    assert text.count("row ") == 40 and "The first 40 of 300 rows; all are in many.csv." in text
    assert csv_of(long).count("\n") == 301


def test_a_label_holds_nothing_that_parts_a_list_of_labels() -> None:
    assert r"\label{tab:agreement_a_b-k-2}" in latex_of(replace(TABLE, name="agreement_a_b,k=2"))


def test_latex_prints_what_pdflatex_knows_and_says_what_it_left_out() -> None:
    assert escape_latex("日本 ok \U0001f600\ud83d Łukasz, Müller’s |ν| ≥ 1") == (
        r"[?] ok [?] [?]ukasz, Müller’s \textbar{}$\nu$\textbar{} $\geq$ 1"
    )
    odd = Table("odd", "Odd.", ["x"], [["日本"]], ["x"], [["日本"]])
    assert latex_of(odd).startswith("% [?]: characters that pdfLaTeX cannot print. odd.csv holds them.\n")
    assert "[?]" not in latex_of(TABLE) and "日本" in csv_of(odd)


def test_a_row_that_begins_with_a_bracket_or_star_is_no_option_of_the_row_before() -> None:
    rows = [["[…]", "1"], ["*", "2"], ["plain", "3"]]
    lines = latex_of(Table("t", "T", ["a", "b"], [], ["a", "b"], rows)).splitlines()
    assert [line for line in lines if line.endswith(r"\\")][1:] == [r"{}[…] & 1 \\", r"{}* & 2 \\", r"plain & 3 \\"]


def test_the_note_stands_below_the_latex_table_and_in_a_text_file(tmp_path: Path) -> None:
    noted = replace(TABLE, note="May not be claimed: 5 % more.")
    before, after = latex_of(noted).split(r"\end{tabular}")
    assert r"5 \% more" in after and "claimed" not in before
    write_table(noted, tmp_path)
    assert (tmp_path / "t.txt").read_text() == "May not be claimed: 5 % more.\n"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdfLaTeX here")
def test_pdflatex_compiles_a_wide_table_of_odd_text_within_the_width_of_the_text(tmp_path: Path) -> None:
    characters = "".join(map(chr, [*range(0x20, 0x250), *range(0x370, 0x400), *range(0x2010, 0x2300), 0x65E5, 0x1F600]))
    cells = [characters[start : start + 40] for start in range(0, len(characters), 40)]
    rows = [[f"{character}x", *cells[:8]] for character in characters[:0x60]]
    for name, part in (("first", rows[:40]), ("last", rows[40:80])):
        write_table(Table(name, "Odd: |ν| ≥ 1", ["a"], [], list("[bcdefghi"), part, "A note."), tmp_path)
    tables = r"\input{first}\clearpage\input{last}"
    text = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{tables}\end{{document}}"
    (tmp_path / "paper.tex").write_text(text)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-2000:]
    assert "too wide" not in said


def test_latex_is_a_booktabs_table() -> None:
    lines = latex_of(TABLE).splitlines()
    assert r"\caption{A \& B}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert lines[lines.index(r"\begin{tabular}{lr}") - 1] == (
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    )
    rules = [lines.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert rules == sorted(rules)
    assert lines[rules[0] + 1] == r"name & x (\%) \\"
    assert [line.endswith(r"\\") for line in lines[rules[1] + 1 : rules[2]]] == [True, True]
    assert r"a\_b & 30 \\" in lines


def test_both_forms_are_written(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["t.csv", "t.tex"]


def test_text_is_aligned() -> None:
    lines = text_of(TABLE).splitlines()
    assert lines == ["name  x (%)", "a_b      30", "~         –"]


def test_a_measure_below_one_is_not_one() -> None:
    assert [bounded(value) for value in (1.0, 0.9959, 0.9949, 0.0, math.nan)] == ["1.00", ">0.99", "0.99", "0.00", "–"]
    assert [bounded(value, 3) for value in (0.99963, 0.9993, -0.5)] == [">0.999", "0.999", "−0.500"]


def test_numbers() -> None:
    assert percent(0.0625, 2) == "6.25\u00a0%"
    assert signed(1.517, 1) == "+1.5"
    assert signed(-0.441, 2) == "−0.44"
    assert interval(-0.05, 0.164, 1, 100) == "[−5.0, +16.4]"
    assert [probability(p) for p in (0.36, 0.0419, 0.0001)] == ["0.36", "0.042", "<0.001"]
    assert [stated("q", p) for p in (0.36, 0.0001)] == ["q = 0.36", "q < 0.001"]
    assert [percent(math.nan), number(math.nan), signed(math.inf), signed(math.nan)] == ["–", "–", "+∞", "–"]
