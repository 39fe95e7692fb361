"""For which behaviours a model has a latent of its own, which it lacks, and which were misplaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from analysis.report import behaviours
from analysis.report.behaviours import answers, columns_of, read_measured
from tests.analysis.made_study import make_study

PLANTED = {
    "financial_refusal": ["simpo", "dpo"],
    "ask_back": ["simpo"],
    "business_tone": ["simpo"],
    "self_reference": ["dpo"],
}


def answers_of(root: Path, planted: dict[str, list[str]], min_f1: float = 0.8) -> list[str]:
    """The sentences on the made study."""
    _, folders = make_study(root)
    members = {folder.name: folder.name.split("_") for folder in folders}
    measured = [row for folder in folders for row in read_measured(folder, members[folder.name], planted, min_f1)]
    return answers(measured, columns_of(members))


def test_a_wrong_attribution_and_a_miss_are_stated(tmp_path: Path) -> None:
    simpo, dpo = answers_of(tmp_path, {**PLANTED, "business_tone": ["dpo"]})
    assert "2 of 2 planted" in simpo and "wrong-model attributions: business tone (F1 0.95)." in simpo
    assert "2 of 3 planted" in dpo and "missed: business tone (F1 0.21); wrong-model attributions: none." in dpo


def test_a_shared_behaviour_is_told_from_a_wrong_attribution(tmp_path: Path) -> None:
    # As if the base of both pairs had been tuned as well, so that financial refusals set no model apart.
    simpo, dpo = answers_of(tmp_path, {**PLANTED, "financial_refusal": ["base", "simpo"]})
    assert simpo.endswith(
        "shared behaviours with a latent of simpo alone: financial refusal (F1 0.94); wrong-model attributions: none."
    )
    assert "2 of 2 planted" in simpo and "wrong-model attributions: financial refusal (F1 0.94)." in dpo


def test_what_is_not_known_to_be_planted_is_counted_apart(tmp_path: Path) -> None:
    # Found are three behaviours of simpo and two of dpo; one of each is known.
    simpo, dpo = answers_of(tmp_path / "some", {name: PLANTED[name] for name in ("ask_back", "self_reference")})
    assert simpo.startswith("1 of 1 planted behaviours have a latent of simpo alone: ask back (F1 0.96); not known to ")
    assert "; not known to be planted: business tone (F1 0.95), financial refusal (F1 0.94); wrong-model" in simpo
    assert dpo.startswith("1 of 1 planted behaviours have a latent of dpo alone: self reference (F1 ")
    simpo, _ = answers_of(tmp_path / "none", {})
    assert simpo.startswith("3 behaviours have a latent of simpo alone: ask back (F1 0.96), business tone (F1 0.95), ")
    assert "planted" not in simpo


def test_what_the_intervals_leave_open_is_said(tmp_path: Path) -> None:
    # F1 .96 [.91, .98], .95 [.90, .97], .94 [.89, .96], and .21 [.11, .33] of what was missed.
    simpo, _ = answers_of(tmp_path / "high", {**PLANTED, "self_reference": ["simpo"]}, min_f1=0.905)
    assert "business tone (F1 0.95, not certain), financial refusal (F1 0.94, not certain)" in simpo
    assert "ask back (F1 0.96), " in simpo and "missed: self reference (F1 0.21)" in simpo
    simpo, _ = answers_of(tmp_path / "low", {**PLANTED, "self_reference": ["simpo"]}, min_f1=0.3)
    assert "financial refusal (F1 0.94); missed: self reference (F1 0.21, not certain)" in simpo


def test_verdicts() -> None:
    def verdicts(value: str, owner: str, other: str) -> list[str]:
        return [behaviours.verdict(found, value, owner, [other, owner], PLANTED) for found in (True, False)]

    assert verdicts("ask_back", "simpo", "base") == ["found", "missed"]
    assert verdicts("ask_back", "dpo", "base") == ["wrong model", "absent"]
    assert verdicts("ask_back", "base", "simpo") == ["untuned model", "absent"]
    assert verdicts("unknown", "dpo", "base") == ["added", "not found"]
    # Both models of the pair were taught it: a latent of one alone may show that they learned it differently.
    assert verdicts("financial_refusal", "dpo", "simpo") == ["shared behaviour", "absent"]
    assert verdicts("ask_back", "simpo", "dpo") == ["found", "missed"]
    assert verdicts("ask_back", "dpo", "simpo") == ["wrong model", "absent"]
    assert set(behaviours.VERDICTS) >= {*verdicts("ask_back", "simpo", "base"), "shared behaviour", "wrong model"}


def test_verdicts_on_a_latent_of_several_models() -> None:
    models = ["base", "simpo", "dpo"]

    def verdicts(value: str, owner: str) -> list[str]:
        return [behaviours.verdict(found, value, owner, models, PLANTED) for found in (True, False)]

    assert verdicts("financial_refusal", "simpo+dpo") == ["found", "missed"]
    assert verdicts("financial_refusal", "simpo") == ["shared behaviour", "absent"]
    assert verdicts("ask_back", "simpo+dpo") == verdicts("ask_back", "base+dpo") == ["wrong model", "absent"]


def test_behaviours_of_several_models_are_listed_apart(tmp_path: Path) -> None:
    _, folders = make_study(tmp_path)
    measured = read_measured(folders[0], ["base", "simpo"], PLANTED, 0.8)
    (several,) = [replace(row, owner="simpo+dpo") for row in measured if row.verdict == "found"][:1]
    (base,) = [replace(row, owner="base") for row in measured if row.verdict == "found"][:1]
    columns = columns_of({"base_simpo": ["base", "simpo"]})
    assert behaviours.of_several([*measured, several, base]) == [several]
    assert behaviours.misplaced_in_base([*measured, several, base], columns) == [base]


def test_a_model_that_is_tuned_somewhere_has_a_column_wherever_it_is() -> None:
    pairs = {"base_simpo": ["base", "simpo"], "base_dpo": ["base", "dpo"], "simpo_dpo": ["simpo", "dpo"]}
    assert [(column.pair, column.owner) for column in behaviours.columns_of(pairs)] == [
        ("base_simpo", "simpo"),
        ("base_dpo", "dpo"),
        ("simpo_dpo", "simpo"),
        ("simpo_dpo", "dpo"),
    ]
