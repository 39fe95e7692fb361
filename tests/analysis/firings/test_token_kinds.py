"""What tokens are, by what the store says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.firings.token_kinds import TEMPLATE, TEXT, kinds_of, read_kinds
from extract.shards import write_tokens
from extract.stores import TokenDocument, TokenStore

BOS, END = 1, 2


def text_document() -> TokenDocument:
    return TokenDocument("", "a", "prose", np.array([BOS, 10, END, 11], dtype=np.uint32), "a text")


def chat_document() -> TokenDocument:
    """<bos> <user> hi END <assistant> [END] yes: an END within a content is the content's."""
    ids = np.array([BOS, 3, 20, END, 4, END, 21], dtype=np.uint32)
    roles = [("user", 2, 3), ("assistant", 5, 7)]
    return TokenDocument("", "b", "chat", ids, messages=[{"role": "user", "content": "hi"}], roles=roles)


def test_text_template_and_roles() -> None:
    roles: dict[str, int] = {}
    assert kinds_of(text_document(), [BOS, END], roles).tolist() == [TEMPLATE, TEXT, TEMPLATE, TEXT]
    assert kinds_of(text_document(), [], roles).tolist() == [TEXT] * 4
    user, assistant = 2, 3
    expected = [TEMPLATE, TEMPLATE, user, TEMPLATE, TEMPLATE, assistant, assistant]
    assert kinds_of(chat_document(), [BOS, END], roles).tolist() == expected
    assert roles == {"user": 0, "assistant": 1}


def test_a_whole_store_and_what_is_kept_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokens(tmp_path, [text_document(), chat_document(), text_document()])
    tokens = TokenStore(tmp_path / "tokens")
    found = read_kinds(tokens, [BOS, END])
    assert found.roles == ["user", "assistant"] and found.sources == ["prose", "chat"] and found.num_kinds == 4
    assert found.source_n.tolist() == [0, 1, 0]
    assert found.kind_T.tolist() == [1, 0, 1, 0, 1, 1, 2, 1, 1, 3, 3, 1, 0, 1, 0]
    other = read_kinds(tokens, [])  # of another tokenizer: not what is kept
    assert other.kind_T[:4].tolist() == [0] * 4
    monkeypatch.setattr("analysis.firings.token_kinds.kinds_of", None)  # nothing is read again
    again = read_kinds(tokens, [END, BOS])
    assert np.array_equal(again.kind_T, found.kind_T) and again.roles == found.roles
