"""The page in a browser: cards appear when asked for, filters and links find them, and documents stay text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.annotate.annotations import read_annotations, write_annotations
from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.report.step import report
from analysis.taxonomy.step import categorise
from tests.analysis.made_study import make_study, write_examples

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>document.title = 'owned'</script> <img src=x onerror=\"document.title = 'owned'\"> </script><!--"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]
# Run behind the page's own script: what is seen at first and after every act, as text in the page.
LOOKING = """<script>
const seen = () => ({
  shown: [...document.querySelectorAll(".card")].map((card) => card.id),
  count: get("count").textContent, page: get("page").textContent,
});
const get = (id) => document.getElementById(id);
const put = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input")); };
const found = { first: seen() };
get("next").click(); found.second = seen();
put("search", "dragon CASTLE"); found.searched = seen();
put("search", "nowhere to be found"); found.nothing = seen();
location.hash = "#base_dpo-350";
setTimeout(() => {
  found.linked = seen();
  found.target = document.querySelector(".card.target").id;
  get("reset").click();
  put("owner", "dpo in base_dpo"); found.owner = seen();
  put("order", "error"); put("error", "0.05"); found.error = seen();
  const facts = [...document.querySelectorAll(".card dl")].map((list) => list.textContent);
  found.errors = facts.map((text) => text.match(/ν error([−\\d.]+)/)[1]);
  get("reset").click();
  const select = get("category"); put("category", select.options[1].value);
  const lines = [...document.querySelectorAll(".card h4 + p")].map((line) => line.textContent.split(" · ")[0]);
  found.category = [select.value, lines];
  get("reset").click(); found.certain = [...get("certainty").options].slice(1).map((option) => {
    put("certainty", option.value);
    return [option.value, Number(seen().count.split(" ")[0]), document.querySelectorAll(".card").length
      && [...document.querySelectorAll(".card dl")].every((list) => list.textContent.includes(`ν${option.value}`))];
  });
  get("reset").click(); found.last = seen(); found.title = document.title;
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
}, 500);
</script></body>"""


def browse(page: Path, profile: Path) -> str:
    """The page as Chromium has it after its scripts ran, without a network."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command = [str(BROWSER), *options, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def analyse(settings: AnalysisSettings, folders: list[Path]) -> None:
    """Describes and categorises with the offline annotator."""
    settings.analysis.taxonomy.encoder = "tfidf"
    settings.analysis.compare.resamples = 100
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen on the way through a page of 65 latents. Its policy would stop the script that looks."""
    root = tmp_path_factory.mktemp("study")
    settings, folders = make_study(root, num_cards=30)
    analyse(settings, folders)
    page = report(settings, folders)
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    looked_at = root / "looked_at.html"
    looked_at.write_text(html.replace("</body>", LOOKING))
    text = re.search(r'<pre id="found">(.*)</pre>', browse(looked_at, root / "browser"))
    assert text is not None
    return json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_cards_come_in_pages(found: dict[str, Any]) -> None:
    first, second = found["first"], found["second"]
    assert first["count"] == "65 of 65 latents" and (first["page"], second["page"]) == ("page 1 of 3", "page 2 of 3")
    assert len(first["shown"]) == len(second["shown"]) == 24
    assert not set(first["shown"]) & set(second["shown"])
    assert found["last"] == first


def test_search_and_filters_look_at_all_latents(found: dict[str, Any]) -> None:
    # Every fifth of the thirty latents in each pair fires on the castle; no label or page decides.
    castle = {f"base_{tuned}-{latent}" for tuned in ("simpo", "dpo") for latent in range(102, 130, 5)}
    assert set(found["searched"]["shown"]) == castle and found["searched"]["count"] == "12 of 65 latents"
    assert found["nothing"]["shown"] == [] and found["nothing"]["page"] == "page 1 of 1"
    assert found["owner"]["count"] == "32 of 65 latents"
    errors = [float(error.replace("−", "-")) for error in found["errors"]]
    assert 0 < len(errors) < 32 and errors == sorted(errors, key=abs) and abs(errors[-1]) <= 0.05
    category, shown = found["category"]
    assert shown and set(shown) == {category}


def test_latents_are_filtered_by_certainty(found: dict[str, Any]) -> None:
    # nu_reconstruction of the made latents is up to 0.7, its interval 0.05 to either side, the threshold 0.75.
    kinds = {name: count for name, count, _ in found["certain"]}
    assert set(kinds) <= {"certain", "threshold within the interval"} and sum(kinds.values()) == 65
    assert all(is_said for *_, is_said in found["certain"])


def test_a_link_opens_the_page_of_its_card_whatever_is_filtered(found: dict[str, Any]) -> None:
    assert "base_dpo-350" in found["linked"]["shown"] and found["target"] == "base_dpo-350"


def test_hostile_documents_are_text_and_a_refusal_is_shown_as_one(tmp_path: Path) -> None:
    settings, folders = make_study(tmp_path)
    for folder in folders:
        (folder / "examples.sqlite").unlink()
        write_examples(folder / "examples.sqlite", dict.fromkeys((300, 301, 302, 350, 351), HOSTILE))
    analyse(settings, folders)
    first, *others = read_annotations(folders[0])
    refused = replace(first, label="", description="", confidence="", reason=HOSTILE, outcome="refused")
    write_annotations(folders[0], [refused, *others])
    seen = browse(report(settings, folders), tmp_path / "browser")
    assert "<title>What tuning changed: made</title>" in seen
    assert seen.count("<article") == 5 and seen.count("<script") == 2 and '<img src="x"' not in seen
    assert seen.count("&lt;script&gt;") > 20
    assert seen.count('<h4 class="lost">description refused</h4>') == 1 and "<h4></h4>" not in seen
    assert seen.index("description refused</h4>") > seen.rindex("<h4>"), "what has no description comes last"
