"""A page as tests read it: its elements, and the cards that its script would make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "br", "input", "link", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


class Page(HTMLParser):
    """Elements of a page with their text; an element closed out of order or left open is an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        if self._open.pop().tag in ("td", "th", "dt", "dd"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, name: str | None = None) -> list[Element]:
        return [
            element
            for element in self.elements
            if element.tag == tag and (name is None or name in (element.attributes.get("class") or "").split())
        ]


def cards_in(page: Page) -> dict[str, dict[str, Any]]:
    """The cards of a page by anchor, with the names of their columns and of their owners."""
    data = json.loads(next(element.text for element in page.all("script") if element.attributes.get("id") == "data"))
    rows = [dict(zip(data["columns"], values, strict=True)) for values in data["cards"]]
    cards = [row | data["owners"][row["of"]] for row in rows]
    return {f"{card['pair']}-{card['latent']}": card for card in cards}


def words(text: str) -> str:
    """Text with single spaces."""
    return " ".join(text.split())
