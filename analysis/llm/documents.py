"""Documents as data in a prompt: cut, their firing tokens marked, and fenced in by what occurs in none of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from analysis.examples.database import Example
from analysis.examples.wording import TEMPLATE

# Brackets around firing tokens: the first pair that no document uses.
MARKS = (("<<", ">>"), ("«", "»"), ("⟦", "⟧"), ("⟪", "⟫"), ("❰", "❱"))
NO_MARK = "�"
# Local servers read control tokens of chat templates wherever they stand: in documents they get other brackets.
BRACKETS = str.maketrans("<>[]", "⟨⟩⟦⟧")


def fenced(texts: Sequence[str], notes: Sequence[str] = ()) -> str:
    """Each text between two lines that hold a key which occurs in no text; its note stands on the first of them.

    The key is derived from the texts, so that equal texts make equal prompts; a document cannot end its own fence:
    it would have to hold a hash of itself.
    """
    texts = [_inert(text) for text in texts]
    key = _key(texts)
    heads = [f" {note}" for note in notes] or [""] * len(texts)
    numbered = enumerate(zip(heads, texts, strict=True), start=1)
    return "\n".join(f"[begin {key} {number}]{head}\n{text}\n[end {key} {number}]" for number, (head, text) in numbered)


def _inert(text: str) -> str:
    """A text without control tokens, and without halves of surrogate pairs, which no request can carry."""
    return TEMPLATE.sub(lambda found: found[0].translate(BRACKETS), text).encode("utf-8", "replace").decode()


def _key(texts: Sequence[str]) -> str:
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    while any(key in text for text in texts):
        key = hashlib.sha256(key.encode()).hexdigest()[:16]
    return key


def marks_for(examples: Sequence[Example]) -> tuple[str, str]:
    """A pair of marks that none of the documents uses; where all are in use, `marked` takes the first out of them."""
    text = "".join("".join(example.tokens) for example in examples)
    return next((pair for pair in MARKS if pair[0] not in text and pair[1] not in text), MARKS[0])


def marked(example: Example, context_tokens: int, marks: tuple[str, str]) -> str:
    """At most `context_tokens` tokens around the strongest activation, runs of firing tokens between marks.

    Tokens without text of their own (parts of a character that a later one completes) hand their mark on.
    """
    start, end = window(example, context_tokens)
    pieces, inside, carried = ["… "] if start > 0 else [], False, False
    for position, token in enumerate(_without(marks, example.tokens[start:end]), start):
        fires = carried or example.activations.get(position, 0.0) > 0
        carried = fires and not token
        if token and fires != inside:
            pieces.append(marks[0] if fires else marks[1])
            inside = fires
        pieces.append(token)
    pieces += [marks[1]] if inside else []
    pieces += [" …"] if end < len(example.tokens) else []
    return "".join(pieces)


def _without(marks: tuple[str, str], tokens: Sequence[str]) -> Sequence[str]:
    """Tokens without marks of their own."""
    text = "".join(tokens)
    for mark in marks:
        if mark in text:
            tokens = [token.replace(mark, NO_MARK) for token in tokens]
    return tokens


def window(example: Example, context_tokens: int) -> tuple[int, int]:
    """Two thirds of the context before the strongest token, one third after it, shifted to stay within the document."""
    start = max(0, min(example.peak - 2 * context_tokens // 3, len(example.tokens) - context_tokens))
    return start, min(len(example.tokens), start + context_tokens)
