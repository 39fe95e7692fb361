"""Writing stores: token documents, and activations of the project's own extraction or of your own models and hooks.

The format is described in `extract.archive`; plain `webdataset.WebDataset` reads every shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from extract.archive import ShardWriter, finished_shard, read_index, shard_path, start_folder
from extract.errors import BadInput
from extract.manifest import Manifest, ShardEntry, provenance
from extract.stats import ActivationStatistics
from extract.stores import SAFETENSORS_DTYPES, TokenDocument, TokenStore


def key_of(document: int) -> str:
    return f"{document:09d}"


def token_members(document: TokenDocument) -> dict[str, bytes]:
    """The members of a token sample."""
    values = asdict(document)
    del values["key"], values["token_ids"]
    buffer = io.BytesIO()
    np.save(buffer, document.token_ids.astype(np.uint32), allow_pickle=False)
    return {
        "json": json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        "tokens.npy": buffer.getvalue(),
    }


def activation_members(acts_ND: Tensor) -> dict[str, bytes]:
    """The members of an activation sample. The norms are those of the stored, rounded values."""
    acts_ND = acts_ND.contiguous()
    return {"safetensors": safetensors.torch.save({"acts": acts_ND, "norms": acts_ND.float().norm(dim=1)})}


def write_tokens(
    store: str | Path,
    documents: Iterable[TokenDocument],
    settings: dict | None = None,
    tokens_per_shard: int = 1_000_000,
    composed: dict | None = None,
) -> Manifest:
    """Write documents as `<store>/tokens`, in their order, and return the manifest. Keys are given by position.

    `settings` decide the content; `composed`, the whole configuration, is kept for the record.
    """
    folder = Path(store) / "tokens"
    settings = {"tokens_per_shard": tokens_per_shard, **(settings or {})}
    start_folder(folder, settings)
    entries = []
    for number, group in enumerate(_grouped(documents, tokens_per_shard)):
        with ShardWriter(folder, number) as writer:
            for position, document in group:
                document.key = key_of(position)
                writer.add(document.key, token_members(document), len(document.token_ids))
            entries.append(writer.finish())
    if not entries:
        raise BadInput(
            f"There are no documents to write to {folder}. Check the corpus: it is empty or everything was filtered "
            f"out."
        )
    manifest = Manifest(
        kind="tokens",
        documents=sum(entry.documents for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        shards=entries,
        settings=settings,
        provenance=provenance(composed),
    )
    manifest.write(folder)
    return manifest


def _grouped(documents: Iterable[TokenDocument], tokens_per_shard: int) -> Iterator[list[tuple[int, TokenDocument]]]:
    """Consecutive (position, document) groups of at least `tokens_per_shard` tokens; the last may be smaller."""
    group, tokens = [], 0
    for position, document in enumerate(documents):
        group.append((position, document))
        tokens += len(document.token_ids)
        if tokens >= tokens_per_shard:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def write_activations(
    store: str | Path, model: str, hookpoint: str, documents: Iterable[tuple[str, Tensor]], skip_first_tokens: int = 1
) -> Manifest:
    """Write activations of your own beside the tokens of a store, as `<store>/activations/<model>/<hookpoint>`.

    Args:
        store: a folder that holds `tokens/` (see `write_tokens`).
        model: the name under which a crosscoder will ask for them, such as "base".
        hookpoint: where they were taken, such as "block15".
        documents: (key, (N, D) tensor) pairs with the keys, order and lengths of the token documents; bf16, fp16 or
            fp32, one dtype and D.
        skip_first_tokens: leading positions that the statistics leave out (attention sinks).

    Raises:
        BadInput: keys, lengths, widths or dtypes that do not fit, or a value that is not finite, naming the document.
    """
    tokens = TokenStore(Path(store) / "tokens")
    folder = Path(store) / "activations" / model / hookpoint
    settings = {"model": {"name": model}, "hookpoint": hookpoint, "skip_first_tokens": skip_first_tokens}
    start_folder(folder, settings)
    iterator = iter(documents)
    for number, numbers in enumerate(tokens.shard_documents()):
        write_activation_shard(folder, number, tokens, numbers, iterator, skip_first_tokens)
    if (extra := next(iterator, None)) is not None:
        raise BadInput(f"Activations of {model} go on after the last token document, with key {extra[0]!r}.")
    return finish_activations(folder, tokens, settings)


def write_activation_shard(
    folder: Path,
    number: int,
    tokens: TokenStore,
    numbers: range,
    documents: Iterator[tuple[str, Tensor]],
    skip_first_tokens: int,
) -> ShardEntry:
    """Write the activations of the token documents `numbers` as shard `number`; see `write_activations`."""
    statistics = None
    with ShardWriter(folder, number) as writer:
        for i in numbers:
            key, acts_ND = next(documents, (None, torch.empty(0, 0)))
            _check_activations(folder, key, acts_ND, tokens, i)
            writer.add(tokens.keys[i], activation_members(acts_ND), len(acts_ND))
            statistics = statistics or ActivationStatistics.empty(acts_ND.shape[1])
            if len(statistics.sum) != acts_ND.shape[1]:
                raise BadInput(
                    f"Activations of {key} have width {acts_ND.shape[1]}, those before {len(statistics.sum)}."
                )
            statistics += ActivationStatistics.of(acts_ND[skip_first_tokens:])
        return writer.finish(statistics, str(acts_ND.dtype).removeprefix("torch."))


def _check_activations(folder: Path, key: str | None, acts_ND: Tensor, tokens: TokenStore, i: int) -> None:
    """BadInput, naming the document, unless these are finite activations of document `i`, one row per token."""
    if key != tokens.keys[i]:
        wrong = f"are missing: got key {key!r}. Give every token document's activations, in the order of the tokens."
    elif acts_ND.dim() != 2 or len(acts_ND) != tokens.lengths[i]:
        shape = tuple(acts_ND.shape)
        wrong = f"have shape {shape}, expected ({tokens.lengths[i]}, d_model): one row per token."
    elif acts_ND.dtype not in SAFETENSORS_DTYPES.values():
        wrong = f"are {acts_ND.dtype}; store bfloat16, float16 or float32."
    elif not torch.isfinite(acts_ND).all():
        wrong = "are not finite. Try dtype=float32 for this model, or another attention implementation."
    else:
        return
    doc_id = tokens.document(i).doc_id
    raise BadInput(f"{folder}: activations of document {tokens.keys[i]} (doc_id {doc_id!r}) {wrong}")


def finish_activations(folder: Path, tokens: TokenStore, settings: dict, composed: dict | None = None) -> Manifest:
    """Write the manifest of activation shards that are all there: counts and statistics merged in the order of the
    shards. `settings` and `composed` as in `write_tokens`.
    """
    paths = [shard_path(folder, number) for number in range(len(tokens.manifest.shards))]
    found = [(path, finished_shard(path)) for path in paths]
    entries = [entry for _, entry in found if entry is not None]
    if len(entries) < len(found):
        missing = [path.name for path, entry in found if entry is None]
        raise BadInput(f"{folder} lacks {', '.join(missing)}: run the extraction again, it writes what is missing.")
    indexes = [read_index(path.with_suffix(".index")) for path in paths]
    parts = [ActivationStatistics.from_json(index["statistics"]) for index in indexes]
    statistics = sum(parts[1:], start=parts[0])
    manifest = Manifest(
        kind="activations",
        documents=sum(entry.documents for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        shards=entries,
        settings=settings,
        provenance=provenance(composed),
        model=settings["model"],
        hookpoint=settings["hookpoint"],
        d_model=len(statistics.sum),
        dtype=indexes[0]["dtype"],
        tokens_sha256=tokens.manifest.content_sha256(),
        statistics=statistics.to_json(),
    )
    manifest.write(folder)
    return manifest
