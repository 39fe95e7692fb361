"""What every token of a store is: plain text, of a chat's template, or of a role; and the source of every document.

The spans of roles are those that extraction recorded when it rendered the chat. Nothing is guessed from text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from extract.stores import TokenDocument, TokenStore
from train.cache import cached

# The first kinds; those of roles follow.
TEXT, TEMPLATE = 0, 1


@dataclass(frozen=True)
class TokenKinds:
    """`kind_T` (num_tokens,) uint8: TEXT, TEMPLATE or 2 + the number of a role; `source_n` (num_documents,) int64."""

    roles: list[str]
    kind_T: np.ndarray
    sources: list[str]
    source_n: np.ndarray

    @property
    def num_kinds(self) -> int:
        return 2 + len(self.roles)


def read_kinds(tokens: TokenStore, special_ids: Sequence[int]) -> TokenKinds:
    """The kinds of all tokens, kept beside the store, because finding them takes all of its token shards.

    TEMPLATE are the tokens of a chat outside of every role's contents, and `special_ids`, the tokenizer's control
    tokens, wherever they stand outside of contents.
    """
    key = {"tokens": tokens.manifest.content_sha256(), "special_ids": sorted(special_ids)}
    found = cached(tokens.folder.parent / "kept", "kinds", key, lambda: _find(tokens, special_ids))
    names = json.loads(found["names"].numpy().tobytes())
    return TokenKinds(names["roles"], found["kind"].numpy(), names["sources"], found["source"].numpy())


def _find(tokens: TokenStore, special_ids: Sequence[int]) -> dict[str, Tensor]:
    roles: dict[str, int] = {}
    sources: dict[str, int] = {}
    kind_T = np.empty(tokens.num_tokens, dtype=np.uint8)
    source_n = np.empty(tokens.num_documents, dtype=np.int64)
    for number, document in enumerate(tokens):
        start, stop = tokens.row_starts[number : number + 2]
        kind_T[start:stop] = kinds_of(document, special_ids, roles)
        source_n[number] = sources.setdefault(document.source, len(sources))
    names = json.dumps({"roles": list(roles), "sources": list(sources)}).encode()
    return {
        "kind": torch.from_numpy(kind_T),
        "source": torch.from_numpy(source_n),
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
    }


def kinds_of(document: TokenDocument, special_ids: Sequence[int], roles: dict[str, int]) -> np.ndarray:
    """The kinds (N,) of a document's tokens; a role that is new gets the next number in `roles`."""
    is_chat = document.messages is not None or bool(document.roles)
    kind_N = np.full(len(document.token_ids), TEMPLATE if is_chat else TEXT, dtype=np.uint8)
    kind_N[np.isin(document.token_ids, np.asarray(special_ids))] = TEMPLATE
    for role, start, end in document.roles:
        kind_N[start:end] = 2 + roles.setdefault(role, len(roles))
    return kind_N
