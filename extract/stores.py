"""Reading stores: token and activation folders, documents by their numbers, activations mapped rather than copied."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.archive import MappedShard
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.stats import ActivationStatistics

SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class TokenDocument:
    """One document as the models read it.

    `token_ids` (N,) uint32; `roles` lists (role, start, end) token spans of a chat's contents, end exclusive: tokens
    outside all of them are the template's; `tags` are for evaluation only, training never sees them; `content_sha256`
    identifies the text whatever its doc_id.
    """

    key: str
    doc_id: str
    source: str
    token_ids: np.ndarray
    text: str | None = None
    messages: list[dict] | None = None
    roles: list[tuple[str, int, int]] = field(default_factory=list)
    tags: dict = field(default_factory=dict)
    content_sha256: str = ""

    def __post_init__(self) -> None:
        self.content_sha256 = self.content_sha256 or content_sha256(self.text, self.messages, self.token_ids)
        self.roles = [(role, start, end) for role, start, end in self.roles]


def content_sha256(text: str | None, messages: list[dict] | None, token_ids: np.ndarray) -> str:
    """Hash of what a document says, stable over processes and versions; without text its tokens stand for it."""
    if text is None and messages is None:
        return hashlib.sha256(token_ids.astype("<u4").tobytes()).hexdigest()
    turns = None if messages is None else [[turn["role"], turn["content"]] for turn in messages]
    content = text if turns is None else json.dumps(turns, ensure_ascii=False)
    return hashlib.sha256((content or "").encode("utf-8", "surrogatepass")).hexdigest()


class _Store:
    """What token and activation folders share: the manifest, the shards, and global document numbers over them."""

    kind: str

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if self.manifest.kind != self.kind:
            raise BadInput(f"{self.folder} holds {self.manifest.kind}, not {self.kind}. Check the path.")
        self._shards = [MappedShard(self.folder, entry) for entry in self.manifest.shards]
        documents = [shard.index["documents"] for shard in self._shards]
        self._starts = np.cumsum([0] + [len(keys) for keys in documents])
        self.keys = [key for keys in documents for key, _ in keys]
        self.lengths = np.array([tokens for keys in documents for _, tokens in keys], dtype=np.int64)
        if len(self.keys) != self.manifest.documents or self.lengths.sum() != self.manifest.tokens:
            raise BadInput(
                f"{self.folder}: indexes and manifest disagree on documents or tokens. Run python -m extract.verify."
            )

    @property
    def num_documents(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def path_of(self, document: int) -> Path:
        """The shard that holds a document."""
        return self._shard_of(document).path

    def _shard_of(self, document: int) -> MappedShard:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.folder}")
        return self._shards[int(np.searchsorted(self._starts, document, side="right")) - 1]


class TokenStore(_Store):
    """Token shards: `<key>.json` (what the document is) and `<key>.tokens.npy` (uint32 (N,))."""

    kind = "tokens"

    def document(self, document: int) -> TokenDocument:
        shard, key = self._shard_of(document), self.keys[document]
        token_ids = np.load(io.BytesIO(shard.read(f"{key}.tokens.npy")), allow_pickle=False)
        return TokenDocument(key=key, token_ids=token_ids, **json.loads(shard.read(f"{key}.json")))

    def shard_documents(self) -> list[range]:
        """The documents of every shard, by their global numbers."""
        return [range(start, end) for start, end in pairwise(self._starts.tolist())]

    def __iter__(self) -> Iterator[TokenDocument]:
        return (self.document(i) for i in range(self.num_documents))


class ActivationStore(_Store):
    """Activation shards of one model at one hookpoint: `<key>.safetensors` with `acts` (N, D) and `norms` (N,)
    float32.
    """

    kind = "activations"

    @property
    def d_model(self) -> int:
        assert self.manifest.d_model is not None
        return self.manifest.d_model

    @property
    def statistics(self) -> ActivationStatistics:
        """Over all positions from `skip_first_tokens` on."""
        assert self.manifest.statistics is not None
        return ActivationStatistics.from_json(self.manifest.statistics)

    def document(self, document: int) -> Tensor:
        """Activations (N, D) in the stored dtype, mapped, not copied: position i is token i."""
        return self._tensor(document, "acts")

    def norms(self, document: int) -> Tensor:
        """Euclidean norms (N,) float32 of the document's activations."""
        return self._tensor(document, "norms")

    def _tensor(self, document: int, name: str) -> Tensor:
        shard = self._shard_of(document)
        offset, _ = shard.members[f"{self.keys[document]}.safetensors"]
        header_size = int.from_bytes(shard.map[offset : offset + 8], "little")
        spec = json.loads(shard.map[offset + 8 : offset + 8 + header_size])[name]
        start, end = spec["data_offsets"]
        dtype = SAFETENSORS_DTYPES[spec["dtype"]]
        flat = torch.frombuffer(
            shard.map, dtype=dtype, count=(end - start) // dtype.itemsize, offset=offset + 8 + header_size + start
        )
        return flat.view(spec["shape"])
