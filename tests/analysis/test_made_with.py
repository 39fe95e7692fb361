"""What records say of an analysis folder, and that models of folders that were made unlike are not compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.compare.config import CompareConfig
from analysis.compare.counts import counts_of_folders
from analysis.compare.pairwise import compare_counts
from analysis.config import OwnerConfig
from analysis.made_with import differing, made_with, selection_of
from analysis.taxonomy.categories import Placed, write_categories
from analysis.taxonomy.step import load_taxonomy
from extract.errors import BadInput
from tests.analysis.compare.test_flow import CODE, make_folder
from tests.analysis.made_study import write_record

CONFIG = CompareConfig(resamples=4000)


def make_unequal(root: Path) -> list[Path]:
    """Two folders: all latents of one model are in a category, none of the other's."""
    folders = [make_folder(root, "one"), make_folder(root, "two")]
    for folder, category, group in zip(folders, (CODE, "other"), ("Code & Data", "other"), strict=True):
        tuned = folder.name.removeprefix("base_")
        rows = [Placed(latent, tuned, category, group, 0.5, "stub") for latent in range(10, 19)]
        write_categories(folder, rows, [group])
    return folders


def test_thresholds_are_those_of_the_record(tmp_path: Path) -> None:
    write_record(tmp_path, max_nu_error=0.05)
    selection = selection_of(tmp_path)
    assert selection.owner == OwnerConfig(max_nu_error=0.05) and selection.kept.skip_first_tokens == 1


@pytest.mark.parametrize("content", [None, "", "{}", '{"settings": {"owner": {"of_another_version": 1}}}'])
def test_a_record_that_does_not_say_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "latents.json").write_text(content)
    with pytest.raises(BadInput, match=r"latents.json does not say .* Run `python -m analysis`"):
        selection_of(tmp_path)


def test_every_setting_that_decides_what_is_counted_is_compared(tmp_path: Path) -> None:
    for name, records in {
        "a": {"annotate": {"num_documents": 20, "llm": {"prompt": "x" * 64}}, "categorise": {"path": None}},
        "b": {"annotate": {"num_documents": 10, "llm": {"prompt": "y" * 64}}, "categorise": {"path": None}},
    }.items():
        (tmp_path / name).mkdir()
        write_record(tmp_path / name)
        for step, settings in records.items():
            inputs = {"taxonomy": f"of {name}", "annotations.jsonl": name}
            record = {"step": step, "settings": settings, "inputs": inputs}
            (tmp_path / name / f"{step}.json").write_text(json.dumps(record))
    found = [made_with(tmp_path / name) for name in "ab"]
    assert differing(*found) == (
        "annotate: num_documents (20, 10)",
        "annotate: llm.prompt",
        'annotate: taxonomy ("of a", "of b")',
        'categorise: taxonomy ("of a", "of b")',
    )
    assert differing(found[0], found[0]) == ()
    assert found[0]["latents: owner.max_nu_error"] == "0.2"
    assert not any("nulls" in name for name in found[0])
    (tmp_path / "a" / "annotate.json").write_text('{"step": "anno')
    with pytest.raises(BadInput, match=r"annotate.json cannot be read"):
        made_with(tmp_path / "a")


def test_latents_that_were_selected_unlike_allow_no_claim(tmp_path: Path) -> None:
    folders = make_unequal(tmp_path)
    alike = compare_counts(counts_of_folders(folders, load_taxonomy())[1], CONFIG)
    assert any(change.may_be_claimed for change in alike[0].changes)
    write_record(folders[1], max_nu_error=0.16)
    (comparison,) = compare_counts(counts_of_folders(folders, load_taxonomy())[1], CONFIG)
    assert comparison.claim.startswith(
        "Nothing may be claimed: the latents of one and two were not selected and named alike (latents: "
        "owner.max_nu_error (0.2, 0.16)), and shares differ"
    )
    assert comparison.certain and comparison.certain.claim.startswith("Nothing may be claimed")
    assert not any(change.may_be_claimed for change in comparison.changes)
    code = next(change for change in comparison.changes if change.name == CODE)
    assert "In spite of its q: the latents of the two models were not selected and named alike." in code.claim
