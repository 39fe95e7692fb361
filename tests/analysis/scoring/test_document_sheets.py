"""People judge what the judge judged: the same excerpts, blind; their kappa stands at the level of documents."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from analysis.agreement import AgreementSettings, main
from analysis.scoring.sheets import read_key
from analysis.scoring.step import score
from extract.errors import BadInput
from tests.analysis.messages_stub import MessagesStub
from tests.analysis.scoring.test_scoring import documents_of, judge, make_folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[AgreementSettings, Path, str]:
    """A scored folder, the settings of the command for it, and all that the judge was shown without marks."""
    settings, folder = make_folder(tmp_path)
    monkeypatch.setattr("analysis.agreement.categorised_folders", lambda _: [folder])
    with MessagesStub(answer=judge, local=True) as stub:
        settings.analysis.llm.base_url = stub.url
        score(settings, folder)
    seen = [text for body in stub.bodies for text in documents_of(body) if "«" not in text]
    given = AgreementSettings(**{**vars(settings), "unit": "documents"})
    return given, folder, "\n".join(seen)


def test_the_sheet_holds_what_the_judge_saw_and_nothing_else(
    judged: tuple[AgreementSettings, Path, str], tmp_path: Path
) -> None:
    settings, folder, seen = judged
    settings.export = str(tmp_path / "sheet.csv")
    main(settings)
    rows = rows_of(tmp_path / "sheet.csv")
    # 5 latents with 20 documents each, of which 100 are drawn.
    assert len(rows) == 100 and list(rows[0]) == ["id", "active", "description", "document"]
    for row in rows:
        assert row["document"].strip("“”") in seen and "«" not in row["document"]
        assert "Fires on the word key" in row["description"]
    for word in ("simpo", "local-model", "near_miss,", "True"):
        assert word not in (tmp_path / "sheet.csv").read_text()


def test_a_person_who_always_says_no_agrees_by_chance_alone(
    judged: tuple[AgreementSettings, Path, str], tmp_path: Path
) -> None:
    settings, folder, _ = judged
    sheet = tmp_path / "sheet.csv"
    settings.export = str(sheet)
    main(settings)
    (path,) = (tmp_path / "analysis" / "people" / "documents").glob("sheet.*.key.csv")
    key = read_key(path)
    verdicts = {
        ("base_simpo", row["latent"], row["document"]): row["verdict"] == "True"
        for row in rows_of(folder / "verdicts.csv")
        if (row["kind"], row["control"]) == ("detection", "none")
    }
    settings.export, settings.filled = None, str(sheet)
    for who, answer in {"same": lambda v: "yes" if v else "No", "never": lambda v: "n"}.items():
        lines = [f"{identity},{answer(verdicts[named])}\n" for identity, named in key.items()]
        sheet.write_text("id,active\n" + "".join(lines))
        settings.who = who
        main(settings)
    rows = {row["between"]: row for row in rows_of(folder / "agreement.csv") if row["level"] == "document"}
    assert float(rows["judge and people: same"]["value"]) == 1
    assert float(rows["judge and people: never"]["value"]) == pytest.approx(0)
    same = rows["judge and people: same"]
    assert same["num_latents"] == "100" and same["measure"] == "cohen_kappa"
    sheet.write_text("id,active\n" + "".join(f"{identity},maybe\n" for identity in key))
    with pytest.raises(BadInput, match="'maybe' is no answer that there is. Known: yes, no"):
        main(settings)


def test_documents_of_one_latent_are_one_cluster(
    judged: tuple[AgreementSettings, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person who agrees with the judge on all documents of four latents and on none of the fifth's."""
    settings, folder, _ = judged
    said = [["part_1", "part_2", "part_3", "answer"]]
    for row in rows_of(folder / "verdicts.csv"):
        if (row["kind"], row["control"]) == ("detection", "none"):
            agrees = (row["verdict"] == "True") == (row["latent"] != "5")
            said.append(["base_simpo", row["latent"], row["document"], "yes" if agrees else "no"])
    people = tmp_path / "analysis" / "people" / "documents"
    people.mkdir(parents=True)
    (people / "anna.csv").write_text("".join(",".join(line) + "\n" for line in said))
    main(settings)
    (row,) = [row for row in rows_of(folder / "agreement.csv") if row["level"] == "document"]
    assert float(row["value"]) == pytest.approx(0.6) and row["num_latents"] == "100"
    # One of five clusters is turned over: of 100 single documents the interval would be 0.44 to 0.76.
    assert float(row["high"]) == pytest.approx(1.0) and float(row["low"]) < 0.3
    for line in said[1:]:
        line[3] = "no"
    (people / "anna.csv").write_text("".join(",".join(line) + "\n" for line in said))
    main(settings)
    assert "unknown" in capsys.readouterr().out


def test_without_a_judge_there_are_no_documents(judged: tuple[AgreementSettings, Path, str], tmp_path: Path) -> None:
    settings, folder, _ = judged
    (folder / "verdicts.csv").unlink()
    settings.export = str(tmp_path / "sheet.csv")
    with pytest.raises(BadInput, match="No document was judged"):
        main(settings)


def test_verdicts_of_other_settings_are_refused(judged: tuple[AgreementSettings, Path, str], tmp_path: Path) -> None:
    settings, _, _ = judged
    settings.export, settings.analysis.scoring.seed = str(tmp_path / "sheet.csv"), 1
    with pytest.raises(BadInput, match=r"verdicts\.csv is of other settings"):
        main(settings)
