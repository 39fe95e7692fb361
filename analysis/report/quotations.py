"""What of a text quotes documents: in quotation marks, word by word, or as a key, a number or an address.

Words are compared in lower case and without regard to how they are encoded (Unicode NFKC); characters without width are
no part of them. In scripts that put no blanks between words, characters are counted in place of words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

WITHHELD = "[…]"
# A run of four words quotes, or of eight characters of a script without blanks, or one word that tells enough alone.
RUN, WORD_WEIGHT, CHARACTER_WEIGHT = 8, 2, 1
# Letters of a word that quotes alone, and characters of one with a digit.
LONG, NUMBERED = 16, 4
# Letters and digits of an address, a path or a key.
FRAGMENT, SHORTEST_FRAGMENT = 8, 4

# Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
LETTER = rf"[^\W_{UNSPACED}]"
UNIT = re.compile(rf"[{UNSPACED}]|{LETTER}+(?:['’]{LETTER}+)*")
CODE = re.compile(r"\S*[\d@_/\\=]\S*")
# Without a closing mark, all that follows may be quoted. A straight single mark may be an apostrophe.
PAIRS = ("“”", '""', "«»", "»«", "„“”", "‚‘’", "`", "‹›", "›‹", "「」", "『』", "《》", "〈〉", "〝〞〟", "＂＂", "””")
QUOTED = re.compile(
    "|".join(f"{pair[0]}[^{pair[1:] or pair[0]}]*(?:[{pair[1:] or pair[0]}]|$)" for pair in PAIRS)
    + r"|‘.*?(?:’(?!\w)|$)|(?<!\w)'.*?'(?!\w)",
    re.DOTALL,
)

Run = tuple[str, ...]
Span = tuple[int, int]


@dataclass(frozen=True)
class Quotable:
    """What a text may quote: all shortest runs of documents that tell enough, and their letters and digits in a row."""

    runs: frozenset[Run]
    letters: str


def quotable(texts: Iterable[str]) -> Quotable:
    """Of the documents `texts`."""
    shown = [_shown(text) for text in texts]
    runs = {run for text in shown for run, _ in _runs(text)}
    return Quotable(frozenset(runs), "\n".join("".join(letter for letter, _ in _letters(text)) for text in shown))


def without_quotes(text: str, documents: Quotable) -> str:
    """`text` with WITHHELD in place of what is in quotation marks or stands in `documents`."""
    text = QUOTED.sub(WITHHELD, _shown(text))
    found = [span for run, span in _runs(text) if run in documents.runs]
    parts, end = [], 0
    for start, stop in _merged(text, [*found, *_fragments(text, documents.letters)]):
        parts += [text[end:start], WITHHELD]
        end = stop
    return "".join([*parts, text[end:]])


def _shown(text: str) -> str:
    """Letters with their accents as one character, and none that has no width."""
    return "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cf")


def _key(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _runs(text: str) -> Iterator[tuple[Run, Span]]:
    """From every word on, the shortest run that tells enough, and where it is."""
    units = list(UNIT.finditer(text))
    keys = [_key(unit.group()) for unit in units]
    for first in range(len(units)):
        weight = 0
        for last in range(first, len(units)):
            weight += _weight(keys[last])
            if weight >= RUN:
                yield tuple(keys[first : last + 1]), (units[first].start(), units[last].end())
                break


def _weight(key: str) -> int:
    if len(key) >= LONG or (len(key) >= NUMBERED and any(character.isdigit() for character in key)):
        return RUN
    return CHARACTER_WEIGHT if re.match(f"[{UNSPACED}]", key) else WORD_WEIGHT


def _letters(text: str) -> Iterator[tuple[str, int]]:
    """Letters and digits as they are compared, with the places they come from."""
    for place, character in enumerate(text):
        yield from ((letter, place) for letter in _key(character) if letter.isalnum())


def _fragments(text: str, letters: str) -> Iterator[Span]:
    """Where an address, a path, a key or a number has letters and digits in a row that documents have too."""
    for code in CODE.finditer(text):
        found = list(_letters(code.group()))
        size = min(FRAGMENT, len(found))
        for first in range(len(found) - size + 1 if size >= SHORTEST_FRAGMENT else 0):
            part = found[first : first + size]
            if "".join(letter for letter, _ in part) in letters:
                yield code.start() + part[0][1], code.start() + part[-1][1] + 1


def _merged(text: str, spans: list[Span]) -> list[Span]:
    """The spans in order; those with no letter or digit in between are one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and not any(character.isalnum() for character in text[merged[-1][1] : start]):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
