"""CSV files of people: how spreadsheets write them, and a clear sentence for what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.csv_files import MAX_BYTES, Line, csv_bytes, not_a_formula, read_csv
from analysis.spelling import did_you_mean
from extract.errors import BadInput


def read(path: Path, content: bytes) -> list[Line]:
    path.write_bytes(content)
    return read_csv(path, "counts", "Give a CSV.")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("comma", [b",", b";"])
def test_what_spreadsheets_write(tmp_path: Path, mark: bytes, end: bytes, comma: bytes) -> None:
    rows = [b"id, name", b"", b",", b'1,"two', b' lines"', b"2,\xc3\xbc "]
    content = mark + end.join(row.replace(b",", comma) for row in rows)
    inner = {b"\r\n": "two\r\n lines", b"\n": "two\n lines", b"\r": "two\r lines"}[end]
    assert read(tmp_path / "a.csv", content) == [
        Line(1, ["id", "name"]),
        Line(4, ["1", inner]),
        Line(6, ["2", "ü"]),
    ]


def test_what_is_written_is_read_back_whatever_ends_lines(tmp_path: Path) -> None:
    odd = ["a\rb", "a\r\nb", "a\nb", "a\u2028b", "a\u2029b", "a\u0085b", "a\x0bb\x1cc", "a\x00b", "a\ud83db", '"a", b']
    read_back = ["a\nb", "a\nb", *odd[2:8], r"a\ud83db", odd[9]]
    lines = read(tmp_path / "a.csv", csv_bytes([["text", "number"], *([text, 1] for text in odd)]))
    assert [line.cells for line in lines[1:]] == [[text, "1"] for text in read_back]


def test_what_a_spreadsheet_would_run_is_text() -> None:
    formulas = ["=1+1", "+A1", "-A1", "@SUM(1)", "\t=1", '=HYPERLINK("http://a.b")']
    assert [not_a_formula(text) for text in formulas] == ["'" + text for text in formulas]
    others = ["-0.5", "-inf", "+3", "a=b", "", "1-2", -0.5, None, True]
    assert [not_a_formula(cell) for cell in others] == others


def test_nothing_is_no_row(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", b"") == read(tmp_path / "a.csv", b"\n,,\n \n") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a,b\n" + b"x" * 200_000, r"a\.csv\), line 2, is no CSV: field larger than field limit.*Give a CSV\.$"),
        (b'a,b\n1,2\n3,"never closed\n4,5\n', r"line 3, is no CSV: unexpected end of data"),
        (b'a,b\n"1"2,3\n', r"line 2, is no CSV"),
        ("a,ü".encode("latin-1"), r"counts \(.*a\.csv\) is not UTF-8 \(byte 2\)"),
        (b"PAR1\x15\x04\xff\xfe", "is not UTF-8"),
        (b"a" * (MAX_BYTES + 1), r"is larger than 64 MiB\. Give a CSV\."),
    ],
)
def test_what_is_no_csv_is_said(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        read(tmp_path / "a.csv", content)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(BadInput, match="is not a file. Give a CSV."):
            read_csv(path, "counts", "Give a CSV.")


def test_the_nearest_name_is_asked_for() -> None:
    assert did_you_mean("Saftey", ["Code", "Safety"]) == " Did you mean 'Safety'?"
    assert did_you_mean("x", ["Code"], " Name one.") == " Name one." and did_you_mean("x", []) == ""
