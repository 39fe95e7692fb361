"""Is a store whole? `python -m extract.verify experiment=STUDY [mode=fast|full]`.

fast: manifests' own hashes, sizes of shards, hashes of indexes. full: also the hash of every shard, every sample
decoded, finite values, norms, and keys and lengths equal to the tokens'. Every bad shard is named; the exit status is 1
if there is one.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from extract.command import run
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.stores import ActivationStore, TokenStore


def problems(settings: ExtractSettings) -> Iterator[str]:
    """One line per defect of the store, each with the file that has it."""
    folders = [settings.tokens_folder]
    folders += [
        settings.activations_folder(name, hook) for name in settings.needed_models for hook in settings.hookpoints
    ]
    sound = []
    for folder in folders:
        found = list(_files(folder, settings.mode))
        yield from found
        sound.append(not found)
    if settings.mode == "full" and sound[0]:
        tokens = TokenStore(folders[0])
        for i, document in enumerate(tokens):
            if len(document.token_ids) != tokens.lengths[i]:
                num = len(document.token_ids)
                yield f"{tokens.path_of(i)}: document {document.key} has {num} tokens, not {tokens.lengths[i]}."
        for folder, whole in zip(folders[1:], sound[1:], strict=True):
            if whole:
                yield from _samples(tokens, ActivationStore(folder))


def _files(folder: Path, mode: str) -> Iterator[str]:
    try:
        manifest = Manifest.read(folder)
    except BadInput as error:
        yield str(error)
        return
    for entry in tqdm(manifest.shards, desc=f"verify {folder}", unit="shard"):
        path = folder / entry.file
        if not path.exists():
            yield f"{path} is missing."
        elif path.stat().st_size != entry.bytes:
            yield f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}: truncated or replaced."
        elif mode == "full" and _sha256(path) != entry.sha256:
            yield f"{path} was altered: its sha256 is not the manifest's."
        index = path.with_suffix(".index")
        if not index.exists():
            yield f"{index} is missing."
        elif _sha256(index) != entry.index_sha256:
            yield f"{index} was altered: its sha256 is not the manifest's."


def _samples(tokens: TokenStore, acts: ActivationStore) -> Iterator[str]:
    if acts.manifest.tokens_sha256 != tokens.manifest.content_sha256():
        yield f"{acts.folder} was made from other tokens than {tokens.folder}."
    elif acts.keys != tokens.keys or (acts.lengths != tokens.lengths).any():
        yield f"{acts.folder} has other documents than {tokens.folder}."
    else:
        for i in range(acts.num_documents):
            x_ND = acts.document(i).float()
            if x_ND.shape != (tokens.lengths[i], acts.d_model) or not torch.isfinite(x_ND).all():
                yield f"{acts.path_of(i)}: document {acts.keys[i]} is not finite or has shape {tuple(x_ND.shape)}."
            elif not torch.equal(x_ND.norm(dim=1), acts.norms(i)):
                yield f"{acts.path_of(i)}: document {acts.keys[i]} has norms that are not those of its activations."


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(settings: ExtractSettings) -> None:
    found = list(problems(settings))
    for line in found:
        print(f"bad: {line}", file=sys.stderr)
    if found:
        print(
            f"verify: {len(found)} problems in {settings.store}. Delete the named files and the folder's "
            f"manifest.json, and run its stage again."
        )
        sys.exit(1)
    print(f"verify: {settings.store} is whole ({settings.mode}).")


if __name__ == "__main__":
    run(ExtractSettings, main)
