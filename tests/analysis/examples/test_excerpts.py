"""Documents on cards: which tokens are marked, what is cut, how blanks are shown."""

from __future__ import annotations

from analysis.examples import excerpts
from analysis.examples.database import Example


def test_spans_mark_tokens_by_activation() -> None:
    tokens = ("<|im_start|>", "user", "\n", "Hi", "", "é", " there", "\n", " you")
    spans = excerpts.spans_of(Example(0, tokens, {4: 5.0, 7: 10.0}), 64)
    assert [(span.text, span.kind, span.value) for span in spans] == [
        ("<|im_start|>user", "template", 0.0),
        ("↵ Hi", "", 0.0),
        ("é", "fired", 5.0),  # the activation of the empty token before it
        (" there", "", 0.0),
        ("↵ ", "fired", 10.0),
        (" you", "", 0.0),
    ]


def test_a_long_document_is_cut_around_its_peak() -> None:
    tokens = tuple(f" t{i}" for i in range(300))
    spans = excerpts.spans_of(Example(0, tokens, {200: 3.0}), 30)
    text = "".join(span.text for span in spans)
    assert text.startswith("…  t180") and " t200" in text and text.endswith(" t209 …")
    assert excerpts.visible("  ", fired=True) == "␣"
