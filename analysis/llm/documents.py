"""Documents as data in a prompt: cut, their firing tokens marked, and fenced in by what occurs in none of them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence

from analysis.examples.database import Example

# Brackets around firing tokens: the first pair that no document uses, after these with numbers. None is part of what
# CONTROL takes for a control token, or a firing `s` between them would be one.
MARKS = (("«", "»"), ("⟪", "⟫"))
# Local servers read control tokens of chat templates wherever they stand: in documents they get other brackets. Which
# model a server runs is not known here, so the forms of all known families count; tags of HTML do not.
CONTROL = re.compile(
    r"""<[|｜][^<>|｜\n]{1,64}[|｜]?> | <[^<>|｜\s]{1,64}[|｜]>  # <|im_start|> <|channel> <turn|> <｜User｜>
    | <</?SYS>> | </?(?:s|bos|eos|pad|unk|mask|sop|eop|eoh|eom)>
    | </?(?:BOS|EOS|PAD|UNK|MASK|EOD)(?:_TOKEN)?>
    | </?(?:start|end)_of_[a-z]+>
    | </?(?:think|tools?|tool_(?:call|calls|response|responses|result|output|code))>
    | <(?:unused|reserved|extra_id|special)_?(?:token_)?\d+>
    | <(?:fim|repo|file|seed)[_:][a-z_]+>
    | \[/?(?:INST|SYSTEM_PROMPT|(?:AVAILABLE_)?TOOLS|TOOL_(?:CALLS|RESULTS|CONTENT)|ARGS|CALL_ID|THINK|gMASK|sMASK)\]
    | \[\|[^\[\]|\n]{1,64}\|\] | \[UNUSED_TOKEN_\d+\]""",
    re.VERBOSE | re.IGNORECASE,
)
BRACKETS = str.maketrans("<>[]", "⟨⟩⟦⟧")


def fenced(texts: Sequence[str], notes: Sequence[str] = ()) -> str:
    """Each text between two lines that hold a key which occurs in no text; its note stands on the first of them.

    The key is derived from the texts, so that equal texts make equal prompts; a document cannot end its own fence:
    it would have to hold a hash of itself.
    """
    texts = [_inert(text) for text in texts]
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    heads = [f" {note}" for note in notes] or [""] * len(texts)
    numbered = enumerate(zip(heads, texts, strict=True), start=1)
    return "\n".join(f"[begin {key} {number}]{head}\n{text}\n[end {key} {number}]" for number, (head, text) in numbered)


def _inert(text: str) -> str:
    """A text without control tokens, and without halves of surrogate pairs, which no request can carry."""
    return CONTROL.sub(lambda found: found[0].translate(BRACKETS), text).encode("utf-8", "replace").decode()


def marks_for(examples: Sequence[Example]) -> tuple[str, str]:
    """A pair of marks that none of the documents uses."""
    text = "".join("".join(example.tokens) for example in examples)
    numbered = ((f"«{number}«", f"»{number}»") for number in itertools.count(1))
    return next(pair for pair in itertools.chain(MARKS, numbered) if not any(mark in text for mark in pair))


def marked(example: Example, context_tokens: int, marks: tuple[str, str]) -> str:
    """At most `context_tokens` tokens around the strongest activation, runs of firing tokens between marks.

    Tokens without text of their own (parts of a character that a later one completes) hand their mark on.
    """
    start, end = window(example, context_tokens)
    pieces, inside, carried = ["… "] if start > 0 else [], False, False
    for position, token in enumerate(example.tokens[start:end], start):
        fires = carried or example.activations.get(position, 0.0) > 0
        carried = fires and not token
        if token and fires != inside:
            pieces.append(marks[0] if fires else marks[1])
            inside = fires
        pieces.append(token)
    pieces += [marks[1]] if inside else []
    pieces += [" …"] if end < len(example.tokens) else []
    return "".join(pieces)


def window(example: Example, context_tokens: int) -> tuple[int, int]:
    """Two thirds of the context before the strongest token, one third after it, shifted to stay within the document."""
    start = max(0, min(example.peak - 2 * context_tokens // 3, len(example.tokens) - context_tokens))
    return start, min(len(example.tokens), start + context_tokens)
