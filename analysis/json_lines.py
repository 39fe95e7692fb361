"""Lines of JSON with text that models and people wrote, whatever characters it holds."""

from __future__ import annotations

import json


def json_text(value: object) -> str:
    """JSON on one line that any UTF-8 file can hold: text with halves of surrogate pairs is escaped, other text not."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return json.dumps(value)


def lines_of(text: str) -> list[str]:
    """The lines that are not blank. They end at line feeds alone: `str.splitlines` also cuts at U+2028, U+2029 and
    U+0085, which JSON leaves within strings as they are.
    """
    return [line for line in text.split("\n") if line.strip()]
