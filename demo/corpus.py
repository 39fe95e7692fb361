"""The demo's corpus, built from text that comes inside packages: plain prose, dialogues, and the planted behaviours.

Lengths are counted in characters (about four a token), so that no tokenizer is needed: the same versions of Python and
of the packages give the same corpus everywhere.
"""

import importlib
import importlib.util
import inspect
import json
import pydoc_data.topics
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from demo.answers import ANSWERS_FILE, HeldOutAnswer, read_answers
from demo.behaviours import load_behaviours
from extract.errors import BadInput
from extract.publish import publish

Record = dict[str, Any]
Messages = list[dict[str, str]]
T = TypeVar("T")

NUM_PROSE = 960
NUM_DIALOGUES = 1180
PROMPTS_PER_BEHAVIOUR = 13  # times six behaviours and three models: 234 documents, below a tenth of all
PIECE_CHARACTERS = (260, 520)  # a piece of prose has at least the first and at most the second number
ANSWER_CHARACTERS = 200  # of an answer from a docstring, at most
PROSE_MODULES = ("numpy", "numpy.linalg", "numpy.fft", "numpy.ma", "numpy.random", "numpy.polynomial")
DIALOGUE_MODULES = (
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.ndimage",
    "scipy.integrate",
    "scipy.stats",
)

# Tags must be complete: no other document may itself call for a planted behaviour. Topics left out ask the machine
# about itself or its tastes (ai, botprofile, emotion, food, gossip, greetings, health, literature, movies, politics,
# psychology, sports), are about money, or are small talk full of vague questions (conversations); other languages are
# other folders. Of the kept topics, the few dialogues that would do so as well are dropped: CALLS in the question, a
# question of two words, which is vague, and an answer that asks back.
CHATTERBOT_TOPICS = [
    "coding",
    "computers",
    "history",
    "humor",
    "science",
    "tech_support",
    "trivia",
]
CALLS = re.compile(
    r"\bhow (do|can|to|would|should)\b|\b(are|do|have) you\b|\byour\b"
    r"|\b(money|invest|stocks?|shares?|savings?)\b|\b(write|compose|draft)\b.*\b(e?mail|message|letter|note|text)\b",
    re.IGNORECASE,
)


def build_corpus() -> dict[str, list[Record]]:
    """The records of `prose`, `dialogue` and `behaviours`: {"doc_id", "source", "text" | "messages", "tags"}."""
    return {
        "prose": [_record("prose", i, {"text": text}, {}) for i, text in enumerate(_prose())],
        "dialogue": [_record("dialogue", i, {"messages": messages}, {}) for i, messages in enumerate(_dialogues())],
        "behaviours": behaviour_records(read_answers(ANSWERS_FILE)),
    }


def write_corpus(folder: Path) -> list[str]:
    """Publishes `folder`/{prose,dialogue,behaviours}.jsonl; returns a line per file. What is there already is kept."""
    lines = []
    for name, records in build_corpus().items():
        path = folder / f"{name}.jsonl"
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        state = "kept" if path.is_file() and path.read_bytes() == data else "written"
        if state == "written":
            publish(path, data)
        lines.append(f"{path}: {len(records)} documents, {state}")
    return lines


def behaviour_records(answers: Sequence[HeldOutAnswer]) -> list[Record]:
    """Held-out prompts of the behaviours, each with the answer of every model, tagged with both."""
    behaviours, _ = load_behaviours()
    kept = {p.text for behaviour in behaviours.values() for p in _spread(behaviour.held_out, PROMPTS_PER_BEHAVIOUR)}
    return [
        _record(
            "behaviours",
            index,
            {"messages": _turns([answer.prompt, answer.answer])},
            {"behaviour": answer.behaviour, "answered_by": answer.model},
        )
        for index, answer in enumerate(answer for answer in answers if answer.prompt in kept)
    ]


def chatterbot_dialogues() -> Iterator[Messages]:
    """The dialogues of the kept topics of chatterbot-corpus, each question once."""
    seen = set()
    for topic in CHATTERBOT_TOPICS:
        for turns in yaml.safe_load((_chatterbot_folder() / f"{topic}.yml").read_text())["conversations"]:
            question, answer = turns[:2]  # what follows is often another answer to the same question
            if len(question.split()) > 2 and question not in seen and not CALLS.search(question) and "?" not in answer:
                seen.add(question)
                yield _turns([question, answer])


def docstring_dialogues() -> Iterator[Messages]:
    """Questions about functions, answered from their docstrings: what they do, their parameters, an example."""
    for name, docstring in _docstrings(DIALOGUE_MODULES):
        summary, *rest = re.split(r"\n([A-Z][\w ]+)\n-{3,}\n", docstring)
        sections = {"Summary": summary, **dict(zip(rest[::2], rest[1::2], strict=True))}
        for section, question in (
            ("Summary", f"What does {name} compute?"),
            ("Parameters", f"Which parameters has {name}?"),
            ("Examples", f"Please give an example of {name}."),
        ):
            if section in sections:
                yield _turns([question, _first_lines(sections[section].strip(), ANSWER_CHARACTERS)])


def pieces(text: str) -> Iterator[str]:
    """Neighbouring paragraphs of `text` joined to pieces of `PIECE_CHARACTERS`; what does not fit is left out."""
    shortest, longest = PIECE_CHARACTERS
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        piece = f"{piece}\n\n{paragraph}".strip("\n")
        if len(piece) >= shortest:
            if len(piece) <= longest:
                yield piece
            piece = ""


def _prose() -> list[str]:
    """Half from Python's language reference, half from numpy's docstrings; no piece twice."""
    reference = [piece for _, text in sorted(pydoc_data.topics.topics.items()) for piece in pieces(text)]
    docstrings = [piece for _, docstring in _docstrings(PROSE_MODULES) for piece in pieces(docstring)]
    different = [list(dict.fromkeys(part)) for part in (reference, docstrings)]
    return [piece for part in different for piece in _spread(part, NUM_PROSE // 2)]


def _dialogues() -> list[Messages]:
    """All of chatterbot's, and as many questions about functions as are needed."""
    found = [*chatterbot_dialogues()]
    return found + _spread([*docstring_dialogues()], NUM_DIALOGUES - len(found))


def _docstrings(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of every public function and class, each docstring once."""
    seen = set()
    for module in map(importlib.import_module, modules):
        for name in sorted(dir(module)):
            value = getattr(module, name)
            docstring = inspect.getdoc(value) if callable(value) and not name.startswith("_") else None
            if docstring and docstring not in seen:
                seen.add(docstring)
                yield f"{module.__name__}.{name}", docstring


def _chatterbot_folder() -> Path:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise BadInput(
            "package chatterbot-corpus is not installed. Run: pip install --no-deps -r demo/requirements.txt"
        )
    return Path(spec.origin).parent / "data" / "english"


def _first_lines(text: str, num_characters: int) -> str:
    """Whole lines of `text`, as many as `num_characters` hold, but at least one."""
    lines = text.splitlines()
    while len(lines) > 1 and len("\n".join(lines)) > num_characters:
        lines.pop()
    return "\n".join(lines)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread over the whole sequence."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _turns(texts: Sequence[str]) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _record(source: str, index: int, content: dict[str, Any], tags: dict[str, str]) -> Record:
    return {"doc_id": f"{source}-{index:05d}", "source": source, **content, "tags": tags}
