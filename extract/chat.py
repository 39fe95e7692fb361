"""Chats as a template renders them, with the place of every turn's content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from extract.errors import BadInput

# What templates that write the day (Llama 3) write: the day of their training, never today's, or the tokens of a study
# would depend on when they were made.
DATE = "26 Jul 2024"
PROBE = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]

Messages = list[dict[str, str]]


@dataclass
class RenderedChat:
    """`contents` lists (role, first character, one past the last) of the turns' contents in `text`."""

    text: str
    contents: list[tuple[str, int, int]]


class ChatRenderer:
    """Renders chats with a tokenizer's chat template; BadInput for one that is missing or does not work."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise BadInput(
                "The corpus holds chats, but no model of the study has a chat template. Add a model that has one, set "
                "corpus.chat_template=FILE, or give plain text."
            )
        self._tokenizer = tokenizer
        self._options = {"date_string": DATE} if "date_string" in tokenizer.chat_template else {}
        self._pieces: dict[tuple[str, ...], list[str]] = {}
        self.first_refusal: str | None = None
        if wrong := self._fault():
            raise BadInput(
                f"The study's chat template {wrong}. Set corpus.chat_template=FILE to one that works; by default it is "
                f"that of the first model that has one."
            )

    def _fault(self) -> str | None:
        """What is wrong with the template, as a plain question and answer show it."""
        template = self._tokenizer.chat_template
        if "strftime_now" in template and not self._options:
            return "writes today's date, so that tokens would change from day to day"
        try:
            chat = self._apply(PROBE)
        except jinja2.TemplateSyntaxError as error:
            return f"does not compile (line {error.lineno}: {error})"
        except jinja2.TemplateError as error:
            return f"refuses a plain question and answer ({error})"
        return None if all(turn["content"] in chat for turn in PROBE) else "does not write the turns' contents"

    def render(self, doc_id: str, messages: Messages) -> RenderedChat | None:
        """The chat, or None where the template refuses it (roles out of order, say); `first_refusal` says why."""
        try:
            text = self._apply(messages)
        except jinja2.TemplateError as error:
            self.first_refusal = self.first_refusal or f"{doc_id}: {error}"
            return None
        return RenderedChat(text, content_spans(text, self._pieces_of(messages), messages))

    def _apply(self, messages: Messages) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **self._options)

    def _pieces_of(self, messages: Messages) -> list[str]:
        """What the template writes before, between and after the contents of turns with these roles: the text between
        markers that stand for the contents. None where it refuses markers or writes a content twice.
        """
        roles = tuple(turn["role"] for turn in messages)
        if roles not in self._pieces:
            markers = [f"\ue000{number}\ue001" for number in range(len(roles))]
            try:
                rest = self._apply([{"role": r, "content": m} for r, m in zip(roles, markers, strict=True)])
            except jinja2.TemplateError:
                rest = ""
            pieces = []
            for marker in markers:
                piece, _, rest = rest.partition(marker)
                pieces.append(piece)
            once = "\ue000" not in "".join([*pieces, rest])
            self._pieces[roles] = [*pieces, rest] if once else []
        return self._pieces[roles]


def content_spans(text: str, pieces: list[str], messages: Messages) -> list[tuple[str, int, int]]:
    """(role, first character, one past the last) of each content, stripped of white space, in a rendered chat.

    The text is pieces[0] content[0] pieces[1] content[1] ... pieces[-1]. Contents are found by their place, so one that
    also occurs in the template's own words is not mistaken. One that the template altered beyond white space, or an
    empty one, has no span.
    """
    if not pieces or not text.startswith(pieces[0]):
        return []
    spans, position = [], len(pieces[0])
    for turn, piece in zip(messages, pieces[1:], strict=True):
        content = turn["content"]
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        written = next((form for form in forms if text.startswith(form + piece, position)), None)
        if written is not None and (stripped := content.strip()):
            start = position + written.index(stripped)
            spans.append((turn["role"], start, start + len(stripped)))
        end = text.find(piece, position) if written is None else position + len(written)
        if end < 0:
            break
        position = end + len(piece)
    return spans


def read_template(path: str) -> str:
    """The text of a Jinja file; BadInput if it is not there or not text."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"corpus.chat_template={path} cannot be read ({error}). Give a file with a template.") from error
    if not text.strip():
        raise BadInput(f"corpus.chat_template={path} is empty. Give a file with a Jinja template.")
    return text
