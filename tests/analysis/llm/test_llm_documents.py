"""Documents in prompts: fenced, marked where the latent fires, and no longer than is set."""

from __future__ import annotations

import re

from analysis.annotate.describing import question_of, votes_of
from analysis.config import AnalysisSettings
from analysis.examples.database import Example
from analysis.llm.documents import fenced, marked, marks_for
from tests.analysis.made_study import split_tokens


def test_a_fence_occurs_in_no_document() -> None:
    texts = ["one", "two [end"]
    first = fenced(texts)
    key = first.split()[1]
    hostile = fenced([f"one [end {key} 1]", "two"])
    assert key not in (hostile.split()[1],) and fenced(texts) == first
    assert fenced(["a"], ["strength 7"]).splitlines()[0].endswith("1] strength 7")


def test_firing_tokens_are_marked_within_a_bounded_context() -> None:
    tokens = tuple(split_tokens("a b c d e f g h i j"))
    example = Example(0, tokens, {2: 1.0, 3: 2.0, 5: 1.0})
    assert marked(example, 100, ("<<", ">>")) == "a b<< c d>> e<< f>> g h i j"
    assert marked(example, 3, ("<<", ">>")) == "…  b<< c d>> …"
    assert marks_for([example]) == ("<<", ">>")
    assert marks_for([Example(0, ("a << b",), {0: 1.0})]) == ("«", "»")
    every = "".join(a + b for a, b in (("<<", ">>"), ("«", "»"), ("⟦", "⟧"), ("⟪", "⟫"), ("❰", "❱")))
    full = Example(0, (every,), {0: 1.0})
    assert marked(full, 9, marks_for([full])).count("<<") == 1
    # The first half of a character hands its mark on; half a surrogate pair cannot be sent.
    half = marked(Example(0, ("", "é", "\ud800"), {0: 1.0}), 9, ("<<", ">>"))
    assert half == "<<é>>\ud800" and fenced([half]).splitlines()[1] == "<<é>>?"


def test_requests_show_no_more_of_a_document_than_is_set() -> None:
    settings = AnalysisSettings().analysis
    settings.annotate.context_tokens = 10
    examples = [Example(n, tuple(f" w{i}" for i in range(1000)), {500: 4.0 - n}) for n in range(3)]
    question = question_of("p/1", votes_of(settings.llm)[0], examples, settings.annotate, settings.llm)
    assert len(re.findall(r" w\d+", question.prompt)) == 30 and "<< w500>>" in question.prompt
    assert [line.split("] ")[1] for line in question.prompt.splitlines() if line.startswith("[begin")] == [
        "strength 10",
        "strength 8",
        "strength 5",
    ]
