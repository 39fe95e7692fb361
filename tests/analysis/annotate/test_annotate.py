"""Planted words are found, and only where the latent fires; every record names its annotator."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.annotate.annotations import ANNOTATOR, Annotation, read_annotations, write_annotations
from analysis.annotate.offline import describe, fragment, judge
from analysis.annotate.step import annotate
from analysis.config import AnnotateConfig
from analysis.examples.database import Example
from analysis.examples.wording import (
    Background,
    Evidence,
    count_background,
    log_odds,
    near,
    ngrams_of,
    of_template,
    words_of,
)
from tests.analysis.made_study import FILLER, make_study, split_tokens, write_examples, write_latents

CONFIG = AnnotateConfig(window=3)


def planted(number: int, text: str, seed: int = 0) -> Example:
    """Twelve filler words, the text, on which the latent fires (on a filler word without a text), twelve more."""
    rng = np.random.default_rng([seed, number])
    before, after = (split_tokens(" " + " ".join(rng.choice(FILLER, 12))) for _ in range(2))
    middle = split_tokens(" " + text)
    fired = {len(before) + i: 5.0 - i for i in range(len(middle))}
    return Example(number, (*before, *middle, *after), fired or {5: 1.0})


def annotation_of(examples: list[Example], config: AnnotateConfig = CONFIG) -> Annotation:
    filler = [list(example.tokens) for example in (planted(i, "", seed=9) for i in range(200))]
    wanted = {ngram for example in examples for ngram in ngrams_of(words_of(example.tokens), config.max_ngram)}
    background = count_background([*filler, *(list(e.tokens) for e in examples)], wanted, config.max_ngram)
    return describe(7, "simpo", examples, background, config)


def test_the_planted_words_become_the_label() -> None:
    found = annotation_of([planted(i, "financial advice") for i in range(10)])
    assert found.label.startswith("financial advice")
    assert len(found.label.split()) <= 5
    assert found.evidence[0].support == 1.0
    assert (found.confidence, found.annotator) == ("high", ANNOTATOR)
    assert "10 of 10 documents" in found.reason
    assert "“financial advice” (100%)" in found.description and found.fragments[0] in found.description


def test_words_that_are_everywhere_are_no_evidence() -> None:
    found = annotation_of([planted(i, "") for i in range(10)])
    assert "financial" not in found.label and found.confidence != "high"


def test_one_document_that_repeats_a_word_proves_nothing() -> None:
    examples = [planted(0, " ".join(["zebra"] * 40)), *(planted(i, "") for i in range(1, 8))]
    assert "zebra" not in annotation_of(examples).label


def test_words_far_from_the_activations_do_not_count() -> None:
    examples = [planted(i, "financial advice") for i in range(10)]
    moved = [Example(e.document, (*e.tokens, *split_tokens(" x y z w v u t s zebra")), e.activations) for e in examples]
    assert all("zebra" not in entry.ngram for entry in annotation_of(moved).evidence)


def test_confidence_falls_with_the_share_of_documents() -> None:
    def mixed(with_words: int) -> Annotation:
        texts = ["financial advice"] * with_words + ["green hills"] * (10 - with_words)
        return annotation_of([planted(i, text) for i, text in enumerate(texts)])

    assert [mixed(n).confidence for n in (10, 6)] == ["high", "medium"]
    assert judge((Evidence("x", 9.0, 0.4),), 10)[0] == "low"
    assert judge((Evidence("x", 9.0, 1.0),), 4)[0] == "low"  # four documents are too few
    assert judge((), 10) == ("low", "no n-gram stands out in at least 25% of 10 documents")


def test_log_odds_by_hand() -> None:
    # y_w = 3 of 4, b_w = 5 of 100, prior of 500 words: alpha_w = 25.
    counts = Counter({"w": 3, "v": 1})
    score = log_odds(counts, Background(Counter({"w": 5, "v": 95}), 100))["w"]
    delta = math.log(28 / (504 - 28)) - math.log(30 / (600 - 30))
    assert score == pytest.approx(delta / math.sqrt(1 / 28 + 1 / 30))


def test_words_are_whole_across_tokens_and_template_tokens_are_none() -> None:
    tokens = ["<|im_start|>", "user", "\n", "I", " can", "’t", " reb", "al", "ance", ".", "<|im_end|>"]
    words = words_of(tokens)
    assert [(word.text, word.token) for word in words] == [("i", 3), ("can't", 4), ("rebalance", 6)]


def test_ngrams_end_with_the_clause() -> None:
    words = words_of(["Of", " the", " meeting", ".", " Best", " regards", ",", " Tom"])
    assert "best regards tom" in list(ngrams_of(words, 3))
    assert "meeting best" not in list(ngrams_of(words, 3))


def test_the_window_counts_words_on_either_side() -> None:
    tokens = split_tokens("a0 b0 c0 d0 e0 f0 g0")
    found = near(words_of(tokens), Example(0, tuple(tokens), {3: 1.0}), 2)
    # The firing token itself is the last of the two words before its end.
    assert [word.text for word in found] == ["c0", "d0", "e0", "f0"]


@pytest.mark.parametrize("ends", ["\n", "<|end_header_id|>"])
def test_a_role_split_over_tokens_belongs_to_the_template(ends: str) -> None:
    tokens = ["say", " user", "<|im_start|>", "ass", "istant", ends, "My", " assistant"]
    assert of_template(tokens) == [False, False, True, True, True, ends != "\n", False, False]
    assert [word.text for word in words_of(tokens)] == ["say", "user", "my", "assistant"]


def test_a_fragment_surrounds_the_peak_and_joins_a_split_word() -> None:
    tokens = ("<|im_end|>", "one", " two", " reb", "al", "ance", " three", "\n\n", "four")
    assert fragment(Example(0, tokens, {3: 2.0, 1: 1.0})) == "one two rebalance three four"


def test_a_latent_without_examples_is_said_to_have_none() -> None:
    found = describe(1, "base", [], Background(Counter(), 0), CONFIG)
    assert (found.label, found.confidence, found.num_documents) == ("no common wording", "low", 0)


def test_every_owned_latent_gets_one_record_and_nobody_else(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    annotate(settings, folder)
    records = {record.latent: record for record in read_annotations(folder)}
    assert set(records) == {300, 301, 302}
    assert {record.owner for record in records.values()} == {"simpo"}
    assert "financial advice" in records[300].label
    assert "regards" in records[302].description
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    assert all(json.loads(line)["annotator"] == "offline (n-grams)" for line in lines)
    assert not list(folder.glob("*.partial"))
    before = (folder / "annotations.jsonl").read_bytes()
    annotate(settings, folder)
    assert (folder / "annotations.jsonl").read_bytes() == before


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\r", "\x0c", "\x1e", "\ud83d"])
def test_annotations_come_back_whatever_characters_they_hold(tmp_path: Path, end: str) -> None:
    settings, (folder, _) = make_study(tmp_path)
    annotate(settings, folder)
    first, *others = read_annotations(folder)
    records = [replace(first, label=f"a{end}b", reason=f"{end}"), *others]
    write_annotations(folder, records)
    assert read_annotations(folder) == records


def test_a_failure_leaves_the_old_annotations(tmp_path: Path) -> None:
    settings, (folder, _) = make_study(tmp_path)
    (folder / "annotations.jsonl").write_text("old\n")
    (folder / "examples.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(Exception, match="not a database"):
        annotate(settings, folder)
    assert (folder / "annotations.jsonl").read_text() == "old\n"


def test_a_crosscoder_without_own_latents_has_no_records(tmp_path: Path) -> None:
    settings, _ = make_study(tmp_path)
    folder = tmp_path / "analysis" / "none"
    folder.mkdir()
    write_latents(folder / "latents.parquet", ["base", "simpo"], set())
    write_examples(folder / "examples.sqlite", {})
    annotate(settings, folder)
    assert read_annotations(folder) == []
