"""Documents -> token documents, many at a time: fast tokenizers work on all cores when they are given a list."""

from __future__ import annotations

from typing import Any

import numpy as np

from extract.chat import ChatRenderer, RenderedChat
from extract.corpus import Document
from extract.stores import TokenDocument


class Encoder:
    """Encodes documents with the tokenizer of a study and its chat template."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._bos = added_bos(tokenizer)
        self._renderer: ChatRenderer | None = None

    @property
    def renderer(self) -> ChatRenderer:
        """Made, and its template checked, with the first chat: plain text needs none."""
        self._renderer = self._renderer or ChatRenderer(self._tokenizer)
        return self._renderer

    def encode(self, documents: list[Document]) -> list[TokenDocument | None]:
        """The documents in their order, whole; None for a chat that the template refuses."""
        texts = iter(self._encode_texts([d for d in documents if d.messages is None]))
        chats = iter(self._encode_chats([d for d in documents if d.messages is not None]))
        return [next(texts if document.messages is None else chats) for document in documents]

    def _encode_texts(self, documents: list[Document]) -> list[TokenDocument]:
        """Plain text, with the special tokens that the tokenizer adds by itself (BOS for most models)."""
        if not documents:
            return []
        rows = self._tokenizer([d.text or "" for d in documents], return_attention_mask=False, verbose=False)
        return [_token_document(d, ids) for d, ids in zip(documents, rows["input_ids"], strict=True)]

    def _encode_chats(self, documents: list[Document]) -> list[TokenDocument | None]:
        """Chats as the template renders them, with the token span of every turn's content."""
        if not documents:
            return []
        rendered = [self.renderer.render(document.doc_id, document.messages or []) for document in documents]
        accepted = [chat.text for chat in rendered if chat]
        if not accepted:
            return [None] * len(documents)
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}
        rows = self._tokenizer(accepted, verbose=False, **options)
        encoded = zip(rows["input_ids"], rows["offset_mapping"], strict=True)
        pairs = zip(documents, rendered, strict=True)
        return [self._chat(document, chat, *next(encoded)) if chat else None for document, chat in pairs]

    def _chat(self, document: Document, chat: RenderedChat, ids: list[int], offsets: list) -> TokenDocument:
        """A template that does not bring BOS gets the one that plain text gets; no chat gets two."""
        roles = role_spans(chat.contents, offsets)
        if self._bos is None or chat.text.lstrip().startswith(self._tokenizer.bos_token):
            return _token_document(document, ids, roles)
        return _token_document(document, [self._bos, *ids], [(role, start + 1, end + 1) for role, start, end in roles])


def _token_document(document: Document, ids: list[int], roles: list | None = None) -> TokenDocument:
    return TokenDocument(
        "",
        document.doc_id,
        document.source,
        np.array(ids, dtype=np.uint32),
        text=document.text,
        messages=document.messages,
        roles=roles or [],
        tags=document.tags,
        content_sha256=document.content_sha256,
    )


def added_bos(tokenizer: Any) -> int | None:
    """The id of BOS where the tokenizer puts it in front of plain text, else None."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    adds = with_special != without and with_special[0] == tokenizer.bos_token_id
    return tokenizer.bos_token_id if adds else None


def role_spans(contents: list[tuple[str, int, int]], offsets: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """(role, first token, one past the last token) of contents that are given by their characters.

    A token belongs to a content when it lies wholly inside its characters; `offsets` are the tokens' (first, one past
    the last) characters.
    """
    if not contents or not offsets:
        return []
    first, last = np.array(offsets).T
    spans = []
    for role, start, end in contents:
        inside = np.flatnonzero((start <= first) & (first < last) & (last <= end))
        if len(inside):
            spans.append((role, int(inside[0]), int(inside[-1]) + 1))
    return spans


def cut(document: TokenDocument, length: int) -> TokenDocument:
    """The first `length` tokens, role spans clipped."""
    document.token_ids = document.token_ids[:length]
    document.roles = [(role, start, min(end, length)) for role, start, end in document.roles if start < length]
    return document
