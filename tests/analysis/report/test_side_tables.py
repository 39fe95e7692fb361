"""Tables of other steps as the page shows them."""

from __future__ import annotations

from pathlib import Path

from analysis.report.side_tables import cell, of_pair, read_table, side_by_side

RULES = (
    "rule,delta_norm_low,max_nu_error,owner,count\n"
    "delta_norm,0.1,,base,3\n"
    "delta_norm,0.1,,simpo,1250\n"
    "nu,,0.2,base,0\n"
    "nu,,0.2,simpo,80\n"
    "configured,0.1,0.2,simpo,79\n"
    "configured,0.1,0.2,dead,5\n"
)


def test_numbers_are_printed_for_people_and_kept_for_machines(tmp_path: Path) -> None:
    (tmp_path / "costs.csv").write_text("kind,requests,usd,refused\ndescribe,12345,1.23456,\ntotal,-1,nan,\n")
    table = read_table(tmp_path / "costs.csv", "what it cost")
    assert table.heading == ["kind", "requests", "usd"]  # nothing was refused
    assert table.printed == [["describe", "12,345", "1.235"], ["total", "−1", "–"]]
    assert table.raw[0] == ["describe", "12345", "1.23456", ""]
    assert [cell(text) for text in ("inf", "0.5", "a-b", "")] == ["∞", "0.500", "a-b", "–"]


def test_shares_are_percent_and_a_measure_has_its_digits_where_it_is_whole_too(tmp_path: Path) -> None:
    (tmp_path / "nulls.csv").write_text(
        "null,measure,focus,other,count,q05,q50,q95,share_passing\n"
        "random_direction,nu_error,claude-a_5,b,469,-0.5,,,1\nshared,nu_error,b,a,9,1,,,0.995736\n"
    )
    table = read_table(tmp_path / "nulls.csv", "nulls")
    assert table.heading == ["null", "measure", "focus", "other", "latents", "quantile 5 %", "below it"]
    assert table.printed == [
        ["random directions", "ν error", "claude-a_5", "b", "469", "−0.500", "100.0\u00a0%"],
        ["shared", "ν error", "b", "a", "9", "1.000", "99.6\u00a0%"],
    ]


def test_a_rule_is_one_row_with_a_column_for_each_owner(tmp_path: Path) -> None:
    (tmp_path / "rules.csv").write_text(RULES)
    table = side_by_side(read_table(tmp_path / "rules.csv", "rules"), "owner", "count")
    assert table.heading == ["rule", "Δ-norm below", "|ν error| below", "base", "simpo", "dead"]
    assert table.printed == [
        ["Δ-norm", "0.1", "", "3", "1,250", ""],
        ["ν", "", "0.2", "0", "80", ""],
        ["configured", "0.1", "0.2", "", "79", "5"],
    ]


def test_a_file_that_is_absent_is_a_table_less(tmp_path: Path) -> None:
    folder = tmp_path / "base_simpo"
    folder.mkdir()
    assert of_pair(folder, tmp_path) == []
    (folder / "rules.csv").write_text(RULES)
    (found,) = of_pair(folder, tmp_path / "tables")
    assert found.source == "../analysis/base_simpo/rules.csv" and len(found.table.printed) == 3
    # As CSV and LaTeX too, under the name of its pair: a paper wants them.
    assert (tmp_path / "tables" / "rules_base_simpo.csv").read_text() == RULES
    assert "1,250" in (tmp_path / "tables" / "rules_base_simpo.tex").read_text()


def test_measures_of_agreement_are_printed_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "agreement.csv"
    rows = ["cohen_kappa,annotator and people,class,0.5,0.25,0.75,9", "krippendorff_alpha,repeats,class,1,0.5,1,9"]
    path.write_text("\n".join(["measure,between,level,value,low,high,num_latents", *rows]) + "\n")
    table = read_table(path, "")
    assert table.heading[0] == "measure" and table.heading[-1] == "latents"
    assert [row[0] for row in table.printed] == ["Cohen’s κ", "Krippendorff’s α"]
