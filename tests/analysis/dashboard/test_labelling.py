"""The dashboard's form: what stands in it, what saving does, and what a file that cannot be read leads to."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from analysis.dashboard import labelling
from analysis.dashboard.app import Study, make_app
from analysis.dashboard.crosscoders import load
from analysis.human import HumanLabel, append_label
from analysis.taxonomy.step import load_taxonomy
from tests.analysis.dashboard.test_dashboard import command, made


def callback(study: Study, output: str, **values: object) -> dict:
    """What the page gets from the callback that has `output`, for these values of inputs and states by their ids."""
    client = make_app(study).server.test_client()
    known = client.get("/_dash-dependencies", headers={"Host": "localhost"}).get_json()
    (found,) = [entry for entry in known if output in entry["output"]]
    outputs = [dict(zip(("id", "property"), name.rsplit(".", 1), strict=True)) for name in _names(found["output"])]
    given = [[{**entry, "value": values.get(entry["id"])} for entry in found[kind]] for kind in ("inputs", "state")]
    body = {"output": found["output"], "outputs": outputs, "inputs": given[0], "state": given[1]}
    changed = [f"{entry['id']}.{entry['property']}" for entry in given[0]]
    posted = client.post(
        "/_dash-update-component", json={**body, "changedPropIds": changed}, headers={"Host": "localhost"}
    )
    assert posted.status_code in (200, 204)
    return posted.get_json() if posted.status_code == 200 else {}


def _names(output: str) -> list[str]:
    return output.strip(".").split("...")


FORM = {"url": "/latent/base_simpo/300", "shown": ["/latent/base_simpo/300", ""], "who": "anna", "saved": 0}


def test_the_form_holds_what_was_given_by_hand_and_nothing_of_the_annotators(tmp_path: Path) -> None:
    folder, study = made(tmp_path)[1][0], Study("made", tmp_path, load_taxonomy())
    before = load(folder)
    found = callback(study, "hand-note.value", url=FORM["url"])["response"]
    assert [found[f"hand-{name}"]["value"] for name in ("label", "category", "note")] == ["", None, ""]
    assert found["hand-label"]["placeholder"] == f"annotator: {before.annotations[300].label}"
    assert found["hand-category"]["placeholder"] == f"annotator: {before.placed[300].category}"
    append_label(folder, HumanLabel(300, "", "other", "why", "anna", "now"))
    found = callback(study, "hand-note.value", url=FORM["url"])["response"]
    assert [found[f"hand-{name}"]["value"] for name in ("label", "category", "note")] == ["", "other", "why"]
    assert found["hand-category"]["placeholder"] == f"annotator: {before.placed[300].category}"
    assert found["shown"]["data"] == FORM["shown"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Saved."),
        ({"shown": ["/latent/base_simpo/301", ""]}, "Not saved: the page shows another latent"),
        ({"shown": []}, "Not saved: the page shows another latent"),
        ({"shown": ["/latent/base_simpo/300", "earlier weights"]}, "Not saved: the page shows another latent"),
        ({"hand-category": "No Such Category"}, "No Such Category is no category of the taxonomy."),
        ({"hand-label": " ", "hand-note": "a note alone"}, "Give a label or a category, and your name."),
        ({"who": " "}, "Give a label or a category, and your name."),
        ({"url": "/latent/base_simpo/99999"}, "Not saved"),
    ],
)
def test_a_label_is_saved_to_the_latent_whose_form_it_stands_in(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = made(tmp_path)[1][0]
    study = Study("made", tmp_path, load_taxonomy())
    found = callback(study, "saved.data", **{**FORM, "hand-label": "mine", **changes})["response"]
    (said,) = [part["children"] for part in found.values() if "children" in part]
    assert said.startswith(message)
    assert set(load(folder).human) == ({300} if message == "Saved." else set())


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = (load(folder), 300)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        said = labelling.save(found, "/p", labelling.whose(found[0], "/p"), ["mine", None, ""], "anna", ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.startswith("Not saved: [Errno 27]") and not load(folder).human


def test_a_broken_line_is_said_on_the_page_and_by_the_command(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    study = Study("made", tmp_path, load_taxonomy())
    (folder / "human.jsonl").write_text('{"latent": 3, "lab\n')
    found = callback(study, "facts.children", url=FORM["url"], saved=0)
    assert "human.jsonl, line 1, is no label" in found["sideUpdate"]["problem"]["children"]
    done = command(f"outputs={tmp_path}", "port=0")
    assert done.returncode == 2 and "human.jsonl, line 1, is no label" in done.stderr and done.stderr.count("\n") == 1


def test_a_crosscoder_that_was_trained_again_starts_without_labels(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    append_label(folder, HumanLabel(300, "of the first", "", "", "anna", "now"))
    assert set(load(folder).human) == {300}
    (folder / "latents.json").write_text('{"inputs": {"crosscoder.safetensors": "bbbb"}}')
    assert not load(folder).human
    study = Study("made", tmp_path, load_taxonomy())
    listed = callback(study, "where.children", pair="base_simpo", order="latent", page=0)["response"]
    assert listed["problem"]["children"].endswith("human.jsonl: 1 of 1 lines are of another crosscoder and not used")
    (folder / "latents.json").unlink()
    assert set(load(folder).human) == {300}
    assert callback(study, "where.children", pair="base_simpo", order="latent", page=0)["response"]["problem"] == {
        "children": ""
    }
