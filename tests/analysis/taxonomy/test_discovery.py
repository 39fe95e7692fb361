"""A taxonomy is made of the descriptions of all models, stays as it is, and can be used like a given one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.annotate.annotations import Annotation, read_annotations, write_annotations
from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.discover import main
from analysis.taxonomy import discovery
from analysis.taxonomy.discovery import discover, pool
from analysis.taxonomy.step import load_taxonomy
from extract.command import compose
from extract.errors import BadInput
from tests.analysis.asked import config, rows
from tests.analysis.made_study import make_study
from tests.analysis.messages_stub import MessagesStub

pytestmark = pytest.mark.usefixtures("key")


def answer(body: dict[str, Any]) -> Any:
    """Proposes a category for each text between fences, and merges all that the lists name."""
    quoted = [line for line in body["messages"][0]["content"].splitlines() if not line.startswith("[")]
    entries = [{"name": line.split(":")[0], "description": f"Text about {line.split(':')[0]}."} for line in quoted]
    unique = list({entry["name"]: entry for entry in entries}.values())
    if "classes" not in body["output_config"]["format"]["schema"]["properties"]:
        return {"categories": unique}
    return {"classes": [{"name": "First", "categories": unique[:2]}, {"name": "Second", "categories": unique[2:]}]}


@pytest.fixture
def study(tmp_path: Path) -> tuple[AnalysisSettings, list[Path]]:
    settings, folders = make_study(tmp_path)
    for folder in folders:
        annotate(settings, folder)
        records = read_annotations(folder)
        write_annotations(folder, [replace(record, label=f"kind {record.latent}") for record in records])
    return settings, folders


def test_descriptions_of_all_models_become_one_taxonomy(study: tuple[AnalysisSettings, list[Path]]) -> None:
    settings, folders = study
    with MessagesStub(answer=answer) as stub:
        settings.analysis.llm = config(stub)
        path = discover(settings, folders)
    categories = load_taxonomy(path)
    assert sorted(category.name for category in categories) == [f"kind {n}" for n in (300, 301, 302, 350, 351)]
    assert [category.group for category in categories] == ["First"] * 2 + ["Second"] * 3
    assert path == Path(settings.outputs) / "analysis" / "taxonomy.yaml"
    proposal = stub.bodies[0]
    asked = proposal["messages"][0]["content"]
    # Whose description is whose is not told.
    assert "simpo" not in str(proposal) and "dpo" not in str(proposal) and asked.count("kind 3") == 5


def test_the_command_pools_all_pairs_of_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesStub(answer=answer_in_one_class) as stub:
        overrides = ["experiment=demo/base_simpo", f"outputs={tmp_path}", f"analysis.llm.base_url={stub.url}"]
        settings = compose(AnalysisSettings, overrides)
        record = Annotation(1, "", "", "text", "low", "r", "a", 1, (), ())
        for pair in ("base_simpo", "base_dpo"):
            write_annotations(tmp_path / "analysis" / pair, [replace(record, owner=pair, label=f"kind {pair}")])
        with pytest.raises(BadInput, match="simpo_dpo is not annotated"):
            main(settings)
        write_annotations(tmp_path / "analysis" / "simpo_dpo", [])
        main(settings)
    assert {category.name for category in load_taxonomy(tmp_path / "analysis" / "taxonomy.yaml")} == {
        "kind base_simpo",
        "kind base_dpo",
    }
    assert f"analysis.taxonomy.path={tmp_path}" in capsys.readouterr().out


def test_many_descriptions_are_proposed_for_in_blocks_and_merged_in_rounds(
    study: tuple[AnalysisSettings, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folders = study
    monkeypatch.setattr(discovery, "BLOCK", 1)
    monkeypatch.setattr(discovery, "LISTS", 2)
    with MessagesStub(answer=answer_in_one_class) as stub:
        settings.analysis.llm = config(stub)
        path = discover(settings, folders)
    assert len(load_taxonomy(path)) == 5
    subjects = [subject for (subject,) in rows(path.with_name("requests.sqlite"), "SELECT subject FROM questions")]
    # 5 blocks; 5 lists make 3, then 2, then 1.
    assert sorted(subjects) == sorted(
        [f"propose/{n}" for n in range(5)]
        + ["merge 1/0", "merge 1/1", "merge 1/2", "merge 2/0", "merge 2/1", "merge 3/0"]
    )


def answer_in_one_class(body: dict[str, Any]) -> Any:
    value = answer(body)
    if "categories" in value:
        return value
    return {"classes": [{"name": "All", "categories": [e for part in value["classes"] for e in part["categories"]]}]}


def test_what_was_discovered_stays(
    study: tuple[AnalysisSettings, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, folders = study
    with MessagesStub(answer=answer) as stub:
        settings.analysis.llm = config(stub)
        path = discover(settings, folders)
        before, paid = path.read_bytes(), stub.paid.total()
        assert discover(settings, folders) == path and path.read_bytes() == before
        assert "stays. To discover anew" in capsys.readouterr().out
        # The same descriptions make the same taxonomy, out of the ledger.
        path.unlink()
        assert discover(settings, folders).read_bytes() == before and stub.paid.total() == paid
        records = read_annotations(folders[0])
        write_annotations(folders[0], [replace(records[0], description="something else"), *records[1:]])
        discover(settings, folders)
        assert "have changed since" in capsys.readouterr().out and path.read_bytes() == before


def test_without_descriptions_there_is_no_taxonomy(study: tuple[AnalysisSettings, list[Path]]) -> None:
    settings, folders = study
    for folder in folders:
        write_annotations(folder, [replace(record, outcome="failed") for record in read_annotations(folder)])
    with pytest.raises(BadInput, match=r"No latent is described.* See annotations\.jsonl"):
        pool(settings, folders)


def test_one_side_alone_makes_no_taxonomy(study: tuple[AnalysisSettings, list[Path]]) -> None:
    settings, folders = study
    with pytest.raises(BadInput, match="those of simpo alone"):
        pool(settings, folders[:1])
    write_annotations(folders[1], [replace(record, outcome="refused") for record in read_annotations(folders[1])])
    with pytest.raises(BadInput, match="those of simpo alone: .* one side"):
        discover(settings, folders)
    (folders[1] / "annotations.jsonl").unlink()
    with pytest.raises(BadInput, match="base_dpo is not annotated"):
        discover(settings, folders)


def test_sides_that_different_annotators_describe_make_no_taxonomy(
    study: tuple[AnalysisSettings, list[Path]],
) -> None:
    settings, folders = study
    write_annotations(folders[1], [replace(record, annotator="x") for record in read_annotations(folders[1])])
    with pytest.raises(BadInput, match=r"different annotators \(offline \(n-grams\), x\)"):
        discover(settings, folders)


def test_the_order_of_descriptions_is_that_of_their_hashes(study: tuple[AnalysisSettings, list[Path]]) -> None:
    """So that it says nothing of models: by the alphabet, labels of one model would stand together."""
    settings, folders = study
    texts = pool(settings, folders)
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert digests == sorted(digests) and len(texts) == 5 and texts != sorted(texts)
    assert texts == pool(settings, folders[::-1])


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ([("A", ["x", "X"])], "'x' occurs twice"),
        ([("A", ["x"]), ("B", ["x"])], "'x' occurs twice"),
        ([("A", ["x"]), ("A", ["y"])], "different names"),
        ([("A", [])], "a class has no categories"),
        ([("A", ["Other"])], "reserved"),
        ([("A", [f"c{n}" for n in range(31)])], "31 categories, not 1 to 30"),
        ([], "1 to 8 classes"),
    ],
)
def test_a_taxonomy_that_could_not_be_loaded_is_no_answer(
    study: tuple[AnalysisSettings, list[Path]], classes: list[tuple[str, list[str]]], reason: str
) -> None:
    settings, folders = study

    def merged(body: dict[str, Any]) -> Any:
        proposed = answer(body)
        made = [{"name": n, "categories": [{"name": c, "description": "d"} for c in cs]} for n, cs in classes]
        return proposed if "categories" in proposed else {"classes": made}

    with MessagesStub(answer=merged) as stub:
        settings.analysis.llm = config(stub)
        with pytest.raises(BadInput, match=rf"did not answer merge 1/0 \(invalid: .*{reason}"):
            discover(settings, folders)
    assert not (Path(settings.outputs) / "analysis" / "taxonomy.yaml").exists()
