"""Reading stores: token and activation folders, documents by their numbers, activations mapped rather than copied.

A store's location is a folder or a URL; see `extract.remote` for what a URL may be and where its content is kept.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.codecs import Encoded, decode, deserialise
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.mapped import MappedShard
from extract.remote import is_url, mount, origin_of
from extract.stats import ActivationStatistics

INDEX_THREADS = 16  # that fetch the indexes of a remote store: each waits for the network most of the time


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
        self.folder = mount(str(folder)) if is_url(folder) else Path(folder)
        self.manifest = Manifest.read(self.folder)
        if self.manifest.kind != self.kind:
            raise BadInput(f"{self.folder} holds {self.manifest.kind}, not {self.kind}. Check the path.")
        self._shards = _open_shards(self.folder, self.manifest)
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


def _open_shards(folder: Path, manifest: Manifest) -> list[MappedShard]:
    origin = origin_of(folder)
    if origin is None:
        return [MappedShard(folder, entry) for entry in manifest.shards]
    with ThreadPoolExecutor(INDEX_THREADS) as threads:
        return list(threads.map(lambda entry: MappedShard(folder, entry, origin), manifest.shards))


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
    """Activation shards of one model at one hookpoint: `<key>.safetensors` with `acts` (N, D), `norms` (N,) float32
    and, for codecs that have them, `scales` (N,) float32.
    """

    kind = "activations"

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self._codes: dict[int, np.ndarray] = {}  # (N, bytes of a row) uint8
        self._scales: dict[int, np.ndarray] = {}

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
        """Activations (N, D), position i being token i: bf16, fp16 and fp32 as stored, mapped, not copied; float32
        decoded from fp8 and int8.
        """
        return decode(self.encoded(document))

    def encoded(self, document: int) -> Encoded:
        """The document as it is stored, mapped, not copied: codes (N, D), and scales (N,) where its codec has them."""
        tensors = self._tensors(document)
        return Encoded(tensors["acts"], tensors.get("scales"))

    def norms(self, document: int) -> Tensor:
        """Euclidean norms (N,) float32 of the document's decoded activations."""
        return self._tensors(document)["norms"]

    def gather(self, documents_B: list[int], positions_B: list[int]) -> Tensor:
        """Activations (B, D) of any tokens, each by its document and its position there; decoded as by `document`."""
        places = list(zip(documents_B, positions_B, strict=True))
        for document in set(documents_B) - self._codes.keys():
            self._remember(document)
        codes, scales = self._codes, self._scales
        rows = np.concatenate([codes[document][position] for document, position in places])
        codes_BD = torch.from_numpy(rows).view(self._dtype).view(len(places), self.d_model)
        if not scales:
            return codes_BD
        scales_B = torch.tensor([scales[document][position] for document, position in places], dtype=torch.float32)
        return decode(Encoded(codes_BD, scales_B))

    def _remember(self, document: int) -> None:
        """Keep where the document's rows are mapped: reading single rows would mostly parse headers."""
        encoded = self.encoded(document)
        self._dtype = encoded.codes_ND.dtype
        self._codes[document] = encoded.codes_ND.view(torch.uint8).numpy()
        if encoded.scales_N is not None:
            self._scales[document] = encoded.scales_N.numpy()

    def _tensors(self, document: int) -> dict[str, Tensor]:
        return deserialise(self._shard_of(document).member(f"{self.keys[document]}.safetensors"))
