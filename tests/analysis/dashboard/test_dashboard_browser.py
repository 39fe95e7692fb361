"""The dashboard in headless Chromium: browsing, labelling, comparing; documents with HTML and script stay text.

Skipped where there is no Chromium, unless CROSSDIFF_REQUIRE_CHROMIUM is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from analysis.annotate.step import annotate
from analysis.human import HumanLabel, append_label, read_labels
from analysis.taxonomy.step import categorise
from tests.analysis.made_study import NUM_LATENTS, make_study

ROOT = Path(__file__).parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CROSSDIFF_REQUIRE_CHROMIUM"), reason="Chromium is not installed"
)
expect.set_options(timeout=60_000)  # milliseconds; a machine that does other things is slow
# What would run as script, load an image or change the page, if any of it were taken for HTML.
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><b id=owned>bold</b>"


@dataclass
class Seen:
    """What a page did: requests, errors on its console."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two annotated pairs; the first document, the description and a label by hand of latent 301 hold HTML."""
    root = tmp_path_factory.mktemp("study")
    settings, folders = make_study(root)
    settings.analysis.taxonomy.encoder = "tfidf"
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    _plant(folders[0])
    return root


def _plant(folder: Path) -> None:
    with sqlite3.connect(folder / "examples.sqlite") as database:
        (number,) = database.execute("SELECT document FROM examples WHERE latent = 301 AND rank = 0").fetchone()
        tokens = json.dumps(["before ", EVIL, " after"])
        row = (tokens, EVIL, EVIL, json.dumps({EVIL: EVIL}), number)
        database.execute(
            "UPDATE documents SET text_tokens = ?, doc_id = ?, source = ?, tags = ? WHERE document = ?", row
        )
        database.execute(
            "UPDATE examples SET activations = ? WHERE document = ?", (json.dumps([[1, 9.0], [2, 3.0]]), number)
        )
    database.close()
    lines = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    for line in lines:
        line["description"] = EVIL if line["latent"] == 301 else line["description"]
    (folder / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    append_label(folder, HumanLabel(301, EVIL, "other", EVIL, EVIL, "then"))


@pytest.fixture(scope="module")
def address(study: Path) -> Iterator[str]:
    """The dashboard, started by its command on a free port; Ctrl-C ends it."""
    line = [sys.executable, "-m", "analysis.dashboard", "experiment=demo", f"outputs={study}", "port=0"]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert running.stdout is not None
    printed = running.stdout.readline()
    found = re.search(r"http://localhost:\d+", printed)
    assert found, printed + running.communicate()[1]
    yield found[0]
    running.send_signal(signal.SIGINT)
    errors = running.communicate(timeout=30)[1]
    assert (running.returncode, errors) == (0, "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def page(browser: Browser, address: str, seen: Seen) -> Iterator[Page]:
    """The start page; afterwards nothing was asked of another machine and nothing went wrong on the page."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
    page.goto(address, timeout=60_000)
    expect(page.locator("table.latents tbody tr")).to_have_count(50)
    yield page
    page.close()
    assert seen.errors == []
    assert all(url.startswith((address, "data:")) for url in seen.requests)


def choose(page: Page, identity: str, option: str) -> None:
    """Picks an option of a dropdown."""
    page.locator(f"#{identity}").click()
    page.get_by_role("option", name=option, exact=False).first.click()
    page.keyboard.press("Escape")


def latents(page: Page) -> list[int]:
    return [int(text) for text in page.locator("table.latents tbody tr td:first-child").all_inner_texts()]


def test_thousands_of_latents_are_paged(page: Page) -> None:
    choose(page, "order", "latent")
    expect(page.locator("#where")).to_have_text(f"{NUM_LATENTS} latents, page 1 of 8")
    expect(page.locator("table.latents tbody tr td:first-child").first).to_have_text("0")
    page.click("#next")
    expect(page.locator("#where")).to_have_text(f"{NUM_LATENTS} latents, page 2 of 8")
    expect(page.locator("table.latents tbody tr td:first-child").first).to_have_text("50")
    assert latents(page) == list(range(50, 100))
    page.click("#previous")
    page.click("#previous")
    expect(page.locator("#where")).to_have_text(f"{NUM_LATENTS} latents, page 1 of 8")


def test_the_table_has_the_room_of_a_latent_that_is_not_open(page: Page, address: str) -> None:
    alone = page.locator("#table").bounding_box()
    page.goto(f"{address}/latent/base_simpo/300")
    expect(page.locator("#documents .document")).to_have_count(8)
    beside, documents = page.locator("#table").bounding_box(), page.locator("#documents").bounding_box()
    assert alone and beside and documents and alone["width"] > 1.8 * beside["width"]
    assert documents["x"] > beside["x"] + beside["width"] and documents["width"] > 400
    page.set_viewport_size({"width": 1400, "height": 1000})  # no column is cut off
    assert page.locator(".list").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_filters_narrow_the_table(page: Page) -> None:
    choose(page, "pair", "base_simpo")
    choose(page, "owners", "simpo (3)")
    expect(page.locator("#where")).to_have_text("3 latents, page 1 of 1")
    assert set(latents(page)) == {300, 301, 302}
    page.fill("#search", "financial advice")
    expect(page.locator("#where")).to_have_text("1 latents, page 1 of 1")
    assert latents(page) == [300]
    page.fill("#search", "")
    page.fill("#error-low", "0.5")
    expect(page.locator("#where")).to_have_text("0 latents, page 1 of 1")


def test_documents_show_the_heat_of_their_tokens(page: Page, address: str) -> None:
    page.goto(f"{address}/latent/base_simpo/300")
    expect(page.locator("#documents .document")).to_have_count(8)
    fired = page.locator("#documents .document").first.locator(".fired")
    expect(fired).to_have_count(4)
    assert fired.first.get_attribute("title") == "activation 10"
    colours = [fired.nth(i).evaluate("e => e.style.backgroundColor") for i in range(4)]
    depths = [float(colour.rstrip(")").split(",")[-1]) for colour in colours]
    assert depths == sorted(depths, reverse=True) and depths[0] > depths[-1] > 0
    expect(page.locator("#pair")).to_contain_text("base_simpo")  # the table follows the address
    expect(page.locator("tr.selected td:first-child")).to_have_text("300")


def test_html_and_script_are_text(page: Page, address: str, seen: Seen) -> None:
    page.goto(f"{address}/latent/base_simpo/301")
    document = page.locator("#documents .document").first
    expect(document.locator(".text")).to_contain_text(EVIL)
    expect(document.locator(".source")).to_contain_text(EVIL)
    expect(page.locator("#description")).to_have_text(EVIL)
    expect(page.locator("#said")).to_contain_text(EVIL)
    expect(page.locator("#latent-title")).to_contain_text(EVIL)
    choose(page, "owners", "simpo")
    expect(page.locator("table.latents tbody tr").filter(has_text="301")).to_contain_text(EVIL)
    page.click("#to-compare")
    expect(page.locator("#side-by-side")).to_contain_text(EVIL)
    assert page.title() == "demo"
    assert page.locator("#owned, #browse img, #compare img, #browse script, #compare script").count() == 0
    assert not any(url.endswith("/x") for url in seen.requests)


def test_labels_by_hand_are_kept(page: Page, address: str, study: Path) -> None:
    page.goto(f"{address}/latent/base_simpo/302")
    expect(page.locator("#latent-title")).to_contain_text("base_simpo / 302")
    expect(page.locator("#hand-label")).to_have_value("")  # the annotator's label is no answer of this person
    expect(page.locator("#hand-label")).to_have_attribute("placeholder", re.compile(r"\w"))
    page.fill("#hand-label", "formal letters")
    page.click("#save")
    expect(page.locator("#message")).to_have_text("Give a label or a category, and your name.")
    page.fill("#who", "anna")
    choose(page, "hand-category", "Professional Communication")
    page.click("#save")
    expect(page.locator("#message")).to_have_text("Saved.")
    expect(page.locator("#said")).to_contain_text("formal letters")
    label = read_labels(study / "analysis" / "base_simpo")[302]
    assert (label.label, label.category, label.who) == ("formal letters", "Professional Communication", "anna")
    page.goto(f"{address}/latent/base_simpo/302")
    expect(page.locator("#hand-label")).to_have_value("formal letters")
    expect(page.locator("#who")).to_have_value("anna")
    choose(page, "owners", "simpo")
    expect(page.locator("table.latents tbody tr").filter(has_text="302")).to_contain_text("✎ formal letters")


def test_two_crosscoders_are_compared(page: Page) -> None:
    page.click("#to-compare")
    choose(page, "pair-a", "base_simpo")
    choose(page, "pair-b", "base_dpo")
    expect(page.locator("#owner-a")).to_contain_text("simpo")
    expect(page.locator("#owner-b")).to_contain_text("dpo")
    # 3 of SimPO's and 2 of DPO's 400 latents are planted.
    owners = page.locator("#owner-counts tbody tr td:first-child").all_inner_texts()
    assert owners == ["simpo", "dpo", "shared", "other", "dead"]
    expect(page.locator("#owner-counts tr").filter(has_text="simpo3")).to_have_text("simpo30.8%00.0%")
    expect(page.locator("#owner-counts tr").filter(has_text="dpo0")).to_have_text("dpo00.0%20.5%")
    expect(page.locator("#shares-category thead")).to_contain_text(
        re.compile(r"simpo in base_simpo \(3, \d of them by hand\)")
    )
    expect(page.locator("#side-by-side")).to_contain_text("simpo in base_simpo")
    expect(page.locator("#side-by-side")).to_contain_text("3 latents")
    expect(page.locator("#side-by-side")).to_contain_text("2 latents")
    page.locator("#side-by-side a").first.click()
    expect(page.locator("#latent-title")).to_contain_text("base_simpo / 300")
