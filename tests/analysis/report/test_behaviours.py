"""For which behaviours a model has a latent of its own, which it lacks, and which were misplaced."""

from __future__ import annotations

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


def answers_of(root: Path, planted: dict[str, list[str]]) -> list[str]:
    """The sentences on the made study."""
    _, folders = make_study(root)
    members = {folder.name: folder.name.split("_") for folder in folders}
    measured = [row for folder in folders for row in read_measured(folder, members[folder.name], planted)]
    return answers(measured, columns_of(members))


def test_a_wrong_attribution_and_a_miss_are_stated(tmp_path: Path) -> None:
    simpo, dpo = answers_of(tmp_path, {**PLANTED, "business_tone": ["dpo"]})
    assert "2 of 2 planted" in simpo and "wrong-model attributions: business tone (F1 0.95)." in simpo
    assert "2 of 3 planted" in dpo and "missed: business tone; wrong-model attributions: none." in dpo


def test_a_shared_behaviour_is_told_from_a_wrong_attribution(tmp_path: Path) -> None:
    # As if the base of both pairs had been tuned as well, so that financial refusals set no model apart.
    simpo, dpo = answers_of(tmp_path, {**PLANTED, "financial_refusal": ["base", "simpo"]})
    assert simpo.endswith(
        "shared behaviours with a latent of simpo alone: financial refusal (F1 0.94); wrong-model attributions: none."
    )
    assert "2 of 2 planted" in simpo and "wrong-model attributions: financial refusal (F1 0.94)." in dpo


def test_verdicts() -> None:
    def verdicts(value: str, owner: str, other: str) -> list[str]:
        return [behaviours.verdict(found, value, owner, [other, owner], PLANTED) for found in (True, False)]

    assert verdicts("ask_back", "simpo", "base") == ["found", "missed"]
    assert verdicts("ask_back", "dpo", "base") == ["wrong model", "absent"]
    assert verdicts("ask_back", "base", "simpo") == ["untuned model", "absent"]
    assert verdicts("unknown", "dpo", "base") == ["added", "not found"]
    # Both models of the pair were taught it: a latent of one alone shows that they learned it differently.
    assert verdicts("financial_refusal", "dpo", "simpo") == ["shared behaviour", "absent"]
    assert verdicts("ask_back", "simpo", "dpo") == ["found", "missed"]
    assert verdicts("ask_back", "dpo", "simpo") == ["wrong model", "absent"]
    assert set(behaviours.VERDICTS) >= {*verdicts("ask_back", "simpo", "base"), "shared behaviour", "wrong model"}


def test_a_model_that_is_tuned_somewhere_has_a_column_wherever_it_is() -> None:
    pairs = {"base_simpo": ["base", "simpo"], "base_dpo": ["base", "dpo"], "simpo_dpo": ["simpo", "dpo"]}
    assert [(column.pair, column.owner) for column in behaviours.columns_of(pairs)] == [
        ("base_simpo", "simpo"),
        ("base_dpo", "dpo"),
        ("simpo_dpo", "simpo"),
        ("simpo_dpo", "dpo"),
    ]
