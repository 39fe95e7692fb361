"""Blinded sheets tell nothing about models; filled sheets are read back, or refused with what is wrong with them."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from analysis.agreement import AgreementSettings, main
from analysis.annotate.step import annotate
from analysis.config import AgreementConfig
from analysis.scoring.agreeing import people_folder, write_agreement
from analysis.scoring.people import LATENTS, add_said, export_latents, known_answers, read_said
from analysis.scoring.sheets import Filled, id_of, read_key, read_sheet
from analysis.taxonomy.step import categorise, load_taxonomy
from extract.command import compose
from extract.errors import BadInput
from tests.analysis.made_study import PLANTED, make_study

CONFIG = AgreementConfig(sample_size=4, documents_per_latent=3, resamples=200)


def sheet_of(tmp_path: Path) -> tuple[Path, Path]:
    """A sheet of four of the planted latents of the made study, and the folder of the keys."""
    _, folders = make_study(tmp_path)
    sheet, keys = tmp_path / "sheet.csv", tmp_path / "keys"
    latents = [(f.name, str(latent)) for f in folders for latent in PLANTED[f.name.removeprefix("base_")]]
    assert export_latents(sheet, keys, latents, folders[0].parent, load_taxonomy(), CONFIG) == 4
    return sheet, keys


def key_in(keys: Path) -> dict[str, tuple[str, ...]]:
    """The one key of a folder."""
    (path,) = keys.glob("sheet.*.key.csv")
    return read_key(path)


def read(sheet: Path, keys: Path) -> list[Filled]:
    return read_sheet(sheet, "category", known_answers(LATENTS, load_taxonomy()), keys)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(sheet: Path, categories: dict[int, str], **changes: str) -> None:
    """Writes categories into the rows by their number, and then `changes` into column and row `column_row`."""
    rows = rows_of(sheet)
    for number, category in categories.items():
        rows[number]["category"] = category
    for place, text in changes.items():
        column, number = place.rsplit("_", 1)
        rows[int(number)][column] = text
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_holds_documents_and_nothing_else(tmp_path: Path) -> None:
    sheet, _ = sheet_of(tmp_path)
    rows = rows_of(sheet)
    assert list(rows[0]) == ["id", "category", "document_1", "document_2", "document_3"]
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbf")  # spreadsheets take it for another encoding otherwise
    assert all(len(row["id"]) == 12 and row["category"] == "" and "«" in row["document_1"] for row in rows)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    texts = [text.replace("\n", "↵ ") for folder in ("base_simpo", "base_dpo") for text in texts_of(tmp_path, folder)]
    for row in rows:
        for number in (1, 2, 3):
            quoted = re.fullmatch("“(?:… )?(.*?)(?: …)?”", row[f"document_{number}"])
            assert quoted and any(re.sub("[«»]", "", quoted[1]) in text for text in texts)
    names = [row["category"] for row in rows_of(tmp_path / "sheet.categories.csv")]
    assert names == [*(category.name for category in load_taxonomy()), "other"]


def texts_of(root: Path, folder: str) -> list[str]:
    """Every document of an analysis folder."""
    with closing(sqlite3.connect(root / "analysis" / folder / "examples.sqlite")) as database:
        return ["".join(json.loads(tokens)) for (tokens,) in database.execute("SELECT text_tokens FROM documents")]


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    sheet, _ = sheet_of(tmp_path)
    cells = [cell for row in rows_of(sheet) for cell in row.values()]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in cells)


def test_the_marks_are_at_the_firing_tokens(tmp_path: Path) -> None:
    sheet, keys = sheet_of(tmp_path)
    latent_of = key_in(keys)
    marked = {latent_of[row["id"]]: row["document_1"].split("«")[1].split("»")[0] for row in rows_of(sheet)}
    # The made latents fire on the first four tokens of their texts.
    for (pair, latent), text in marked.items():
        planted = PLANTED[pair.removeprefix("base_")][int(latent)][1]
        assert text.split() == planted.split()[:4]


def test_the_sample_is_the_same_every_time_and_another_with_another_seed(tmp_path: Path) -> None:
    sheet, _ = sheet_of(tmp_path)
    first = sheet.read_bytes()
    other, _ = sheet_of(tmp_path / "again")
    assert other.read_bytes() == first
    assert len({id_of(named, seed) for named in (("base_simpo", "300"), ("base_dpo", "300")) for seed in (0, 1)}) == 4


def test_a_filled_sheet_maps_back(tmp_path: Path) -> None:
    sheet, keys = sheet_of(tmp_path)
    key = key_in(keys)
    fill(sheet, {0: "Translation & Language Switching", 1: " other ", 2: "creative generation"})
    judged = read(sheet, keys)
    assert [row.answer for row in judged] == [
        "Translation & Language Switching",
        "other",
        "Creative Generation",
        None,
    ]
    assert [row.named for row in judged] == [key[row["id"]] for row in rows_of(sheet)]


def test_a_sheet_with_semicolons_is_read(tmp_path: Path) -> None:
    sheet, keys = sheet_of(tmp_path)
    ids = [row["id"] for row in rows_of(sheet)]
    sheet.write_text("id;category\n" + "".join(f"{identity};Code Generation & Analysis\n" for identity in ids))
    assert {row.answer for row in read(sheet, keys)} == {"Code Generation & Analysis"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_1": "Sumarization & Condensing"}, "Did you mean 'Summarization & Condensing'?"),
        ({"id_0": "ffffffffffff"}, "1 ids that were not exported, such as 'ffffffffffff'"),
        ({"category_0": "", "category_1": ""}, "no row has a category"),
    ],
)
def test_mistakes_in_a_sheet_are_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    sheet, keys = sheet_of(tmp_path)
    fill(sheet, {0: "other", 1: "other"}, **changes)
    with pytest.raises(BadInput, match=message):
        read(sheet, keys)


def test_missing_and_doubled_rows_are_named(tmp_path: Path) -> None:
    sheet, keys = sheet_of(tmp_path)
    fill(sheet, dict.fromkeys(range(4), "other"))
    lines = sheet.read_text().splitlines(keepends=True)
    sheet.write_text("".join(lines[:-1]))
    with pytest.raises(BadInput, match="has 1 ids no longer"):
        read(sheet, keys)
    sheet.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(BadInput, match="has 1 ids twice"):
        read(sheet, keys)
    sheet.write_text("who,what\n1,2\n")
    with pytest.raises(BadInput, match="no column id and no column category"):
        read(sheet, keys)
    sheet.write_text("id,category\n1,other\n")
    with pytest.raises(BadInput, match="no id is known to an export"):
        read(sheet, keys)
    with pytest.raises(BadInput, match=r"nowhere\.csv\) is not a file"):
        read(tmp_path / "nowhere.csv", keys)


def test_a_sheet_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("a person's work")
    given = {**vars(settings), "export": str(sheet)}
    with pytest.raises(BadInput, match=r"sheet\.csv exists, and may hold answers"):
        AgreementSettings(**given).check()
    with pytest.raises(BadInput, match="exists, and may hold answers"):
        export_latents(sheet, tmp_path / "keys", [("base_simpo", "300")], folders[0].parent, load_taxonomy(), CONFIG)
    assert sheet.read_text() == "a person's work" and not (tmp_path / "sheet.categories.csv").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"export": "new.csv", "filled": "old.csv", "who": "anna"}, "one of them at a time"),
        ({"export": "new.csv", "who": "anna"}, "one of them at a time"),
        ({"who": "anna"}, r"who \(anna\) says who filled in a sheet, and there is none"),
        ({"filled": "old.csv"}, "must name the person"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, given: dict[str, str], message: str) -> None:
    settings, _ = make_study(tmp_path)
    with pytest.raises(BadInput, match=message):
        AgreementSettings(**{**vars(settings), **given}).check()


def test_sheets_of_one_name_keep_their_keys(tmp_path: Path) -> None:
    """Samples of one stem, from several folders: each is read back by its own key, also where one holds another."""
    _, folders = make_study(tmp_path)
    latents = [(f.name, str(latent)) for f in folders for latent in PLANTED[f.name.removeprefix("base_")]]
    sizes = [1, 2, 3, 4, 5]
    for number, size in enumerate(sizes):
        (tmp_path / str(number)).mkdir()
        config = AgreementConfig(sample_size=size, documents_per_latent=1)
        sheet = tmp_path / str(number) / "sheet.csv"
        export_latents(sheet, tmp_path / "keys", latents, folders[0].parent, load_taxonomy(), config)
        fill(sheet, {0: "other"})
    assert [len(read(tmp_path / str(number) / "sheet.csv", tmp_path / "keys")) for number in range(5)] == sizes


def test_a_second_sheet_adds_to_what_a_person_said(tmp_path: Path) -> None:
    path = tmp_path / "anna.csv"
    first = [Filled(("p", str(i)), answer) for i, answer in enumerate(["a", "b", None])]
    assert add_said(path, first) == 2
    assert add_said(path, [Filled(("p", "1"), "c"), Filled(("p", "0"), None), Filled(("p", "9"), "d")]) == 3
    assert read_said(tmp_path)["anna"] == {("p", "0"): "a", ("p", "1"): "c", ("p", "2"): None, ("p", "9"): "d"}


def test_a_cell_of_any_size_is_one_sentence(tmp_path: Path) -> None:
    sheet, keys = sheet_of(tmp_path)
    sheet.write_text("id,category\n1," + "x" * 200_000 + "\n")
    with pytest.raises(BadInput, match=r"sheet\.csv\), line 2, is no CSV"):
        read(sheet, keys)


def test_a_person_is_compared_with_the_annotator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export, filling in what the annotator said of all but one latent, import: one kappa for each level."""
    settings, folders = make_study(tmp_path)
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    monkeypatch.setattr("analysis.agreement.categorised_folders", lambda _: folders)
    sheet = tmp_path / "sheet.csv"
    given = AgreementSettings(**{**vars(settings), "export": str(sheet)})
    given.composed_from = ["experiment=demo", "outputs=a b", f"export={sheet}"]
    main(given)
    # What is to be typed then is what was typed, with the filled sheet in place of the empty one.
    again = f"python -m analysis.agreement experiment=demo 'outputs=a b' filled={sheet} who=NAME"
    assert capsys.readouterr().out.splitlines()[-1] == f"Then: {again}"
    key = key_in(tmp_path / "analysis" / "people" / "latents")
    said = {
        (folder.name, row["latent"]): row["category"]
        for folder in folders
        for row in rows_of(folder / "categories.csv")
    }
    answers = [said[key[row["id"]]] for row in rows_of(sheet)]
    fill(sheet, dict(enumerate([*answers[:-1], "Minor Protection"])))
    given.export, given.filled, given.who = None, str(sheet), "anna"
    main(given)
    assert len(read_said(tmp_path / "analysis" / "people" / "latents")["anna"]) == len(answers)
    rows = {row["level"]: row for row in rows_of(tmp_path / "analysis" / "agreement.csv")}
    same = len(answers) - 1
    both = [*answers[:-1], "Minor Protection"]
    chance = sum(answers.count(name) * both.count(name) for name in set(answers)) / len(answers) ** 2
    expected = (same / len(answers) - chance) / (1 - chance)
    assert rows["category"]["between"] == "annotator and people" and rows["category"]["measure"] == "cohen_kappa"
    assert float(rows["category"]["value"]) == pytest.approx(expected)
    assert int(rows["class"]["num_latents"]) == len(answers)
    assert all((folder / "agreement.csv").is_file() for folder in folders)
    (tmp_path / "own.yaml").write_text("A class: {A category: what it is}\n")
    given.filled, given.analysis.taxonomy.path = None, str(tmp_path / "own.yaml")
    with pytest.raises(BadInput, match=r"anna\.csv is of another taxonomy"):
        main(given)


def test_people_are_compared_over_the_latents_of_each_pair(tmp_path: Path) -> None:
    """Anna and bob judged one latent of SimPO's and two of DPO's, cleo one of DPO's alone."""
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder, settings.analysis.agreement.resamples = "tfidf", 50
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    units = [("base_simpo", "300"), ("base_dpo", "350"), ("base_dpo", "351")]
    for who, judged in {"anna": units, "bob": units, "cleo": units[1:2]}.items():
        answers = [
            Filled(unit, name) for unit, name in zip(judged, ("other", "other", "Minor Protection"), strict=False)
        ]
        add_said(people_folder(settings, LATENTS) / f"{who}.csv", answers)
    for these, num, people in ((folders[:1], 1, 2), (folders[1:], 2, 3), (folders, 3, 3)):
        rows = [row for row in write_agreement(settings, these, tmp_path / "here") if row.level == "category"]
        assert [row.num_latents for row in rows if row.measure == "krippendorff_alpha"] == [num]
        assert sum(row.measure == "cohen_kappa" for row in rows) == people


def test_a_chosen_pair_leaves_the_others_in_what_is_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Anna judged one latent of SimPO's and two of DPO's."""
    settings, folders = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    units = [("base_simpo", "300"), ("base_dpo", "350"), ("base_dpo", "351")]
    said = people_folder(settings, LATENTS) / "anna.csv"
    add_said(
        said, [Filled(unit, name) for unit, name in zip(units, ("other", "other", "Minor Protection"), strict=True)]
    )
    overrides = [f"outputs={tmp_path}", "analysis.agreement.resamples=50"]
    main(compose(AgreementSettings, ["experiment=demo", *overrides]))
    pooled = tmp_path / "analysis" / "agreement.csv"
    before, printed = pooled.read_bytes(), capsys.readouterr().out
    pooled.unlink()
    main(compose(AgreementSettings, ["experiment=demo/base_simpo", *overrides]))
    assert pooled.read_bytes() == before and capsys.readouterr().out == printed
    assert {row["num_latents"] for row in rows_of(pooled)} == {"3"}
    assert {row["num_latents"] for row in rows_of(folders[0] / "agreement.csv")} == {"1"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["filled=sheet.csv"], r"who \(None\) must name the person"),
        (["filled=sheet.csv", "who=../anna"], "must name the person"),
        (["unit=tokens"], r"unit \(tokens\) must be"),
    ],
)
def test_settings_that_cannot_be_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compose(AgreementSettings, ["experiment=demo", *overrides])
