"""Is a store whole? `python -m extract.verify experiment=STUDY [mode=fast|full] [repair=true]`.

fast: manifests' own hashes, sizes of shards, hashes of indexes. full: also the hash of every shard, every sample
decoded, finite values, norms, and keys and lengths equal to the tokens'. Every bad file is named; the exit status is 1
if there is one. `repair=true` makes the bad shards again, and only those, and looks once more.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from extract.archive import read_index
from extract.command import run
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.remote import is_url
from extract.stats import measure
from extract.stores import ActivationStore, TokenStore


@dataclass(frozen=True)
class Problem:
    """A bad file and what is wrong with it. `path` lies in the folder of tokens or activations that has the problem."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}"

    @property
    def shard(self) -> int | None:
        """The number of the shard that must be made again; None for manifest.json and settings.json."""
        return int(self.path.stem.partition("-")[2]) if self.path.stem.startswith("shard-") else None


def problems(settings: ExtractSettings) -> Iterator[Problem]:
    """Every defect of the store, folder by folder, the tokens first."""
    folders = folders_of(settings)
    sound = []
    for folder in folders:
        found = list(_files(folder, settings.mode == "full"))
        yield from found
        sound.append(not found)
    if settings.mode == "full" and sound[0]:
        tokens = TokenStore(folders[0])
        yield from _token_samples(tokens)
        for folder, whole in zip(folders[1:], sound[1:], strict=True):
            if whole:
                yield from _samples(tokens, ActivationStore(folder))


def folders_of(settings: ExtractSettings) -> list[Path]:
    """The tokens, then the activations of every needed model at every hookpoint."""
    activations = [
        settings.activations_folder(name, hookpoint)
        for name in settings.needed_models
        for hookpoint in settings.hookpoints
    ]
    return [settings.tokens_folder, *activations]


def _files(folder: Path, full: bool) -> Iterator[Problem]:
    manifest = readable_manifest(folder)
    if manifest is None:
        there = (folder / "manifest.json").exists()
        yield Problem(folder / "manifest.json", "was altered." if there else "is missing: the folder is not finished.")
        yield from _against_own_indexes(folder, full)
        return
    if not _is_canonical(folder / "manifest.json"):
        yield Problem(folder / "manifest.json", "was altered.")
    settings = folder / "settings.json"
    if not settings.exists():
        yield Problem(settings, "is missing.")
    elif settings.read_bytes() != json.dumps(manifest.settings, indent=1).encode():
        yield Problem(settings, "was altered: the manifest says that the shards were made with other settings.")
    for entry in tqdm(manifest.shards, desc=f"verify {folder}", unit="shard"):
        path = folder / entry.file
        yield from _archive(path, entry.bytes, entry.sha256, full)
        index = path.with_suffix(".index")
        if not index.exists():
            yield Problem(index, "is missing.")
        elif _sha256(index) != entry.index_sha256:
            yield Problem(index, "was altered: its sha256 is not the manifest's.")


def readable_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder` if it is there and its own hash is right."""
    try:
        return Manifest.read(folder)
    except BadInput:
        return None


def _is_canonical(path: Path) -> bool:
    """Whether the file is, byte by byte, what its JSON is written as: white space is not part of any hash."""
    data = path.read_bytes()
    return data == json.dumps(json.loads(data), indent=1).encode()


def _against_own_indexes(folder: Path, full: bool) -> Iterator[Problem]:
    """What can be said of shards without a manifest: whether archive and index fit each other."""
    for index in sorted(folder.glob("shard-*.index")):
        try:
            entry = read_index(index)
        except BadInput:
            yield Problem(index, "is damaged.")
            continue
        yield from _archive(index.with_suffix(".tar"), entry["bytes"], entry["sha256"], full)


def _archive(path: Path, num_bytes: int, sha256: str, full: bool) -> Iterator[Problem]:
    if not path.exists():
        yield Problem(path, "is missing.")
    elif path.stat().st_size != num_bytes:
        yield Problem(path, f"has {path.stat().st_size} bytes, not {num_bytes}: truncated or replaced.")
    elif full and _sha256(path) != sha256:
        yield Problem(path, "was altered: its sha256 is not the recorded one.")


def _token_samples(tokens: TokenStore) -> Iterator[Problem]:
    for i, document in enumerate(tokens):
        if len(document.token_ids) != tokens.lengths[i]:
            num = len(document.token_ids)
            yield Problem(tokens.path_of(i), f"holds {num} tokens of document {document.key}, not {tokens.lengths[i]}.")


def _samples(tokens: TokenStore, acts: ActivationStore) -> Iterator[Problem]:
    manifest = acts.folder / "manifest.json"
    if acts.manifest.tokens_sha256 != tokens.manifest.content_sha256():
        yield Problem(manifest, f"says that it was made from other tokens than {tokens.folder}.")
    elif acts.keys != tokens.keys or (acts.lengths != tokens.lengths).any():
        yield Problem(manifest, f"lists other documents than {tokens.folder}.")
    else:
        for i in range(acts.num_documents):
            if wrong := _wrong_sample(acts, i, int(tokens.lengths[i])):
                yield Problem(acts.path_of(i), f"is wrong: document {acts.keys[i]} {wrong}.")


def _wrong_sample(acts: ActivationStore, i: int, length: int) -> str | None:
    x_ND = acts.document(i)
    if x_ND.shape != (length, acts.d_model):
        return f"has shape {tuple(x_ND.shape)}, not {(length, acts.d_model)}"
    _, norms_N = measure(x_ND)
    if not torch.isfinite(norms_N).all():
        return "is not finite"
    same = torch.allclose(norms_N, acts.norms(i).double(), rtol=1e-5)  # stored in float32, by any release
    return None if same else "has norms that are not those of its activations"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(settings: ExtractSettings) -> None:
    if is_url(settings.store):
        raise BadInput(
            f"{settings.store} is remote. What is read from it is checked by its hash on arrival; verify and repair "
            f"the whole where it was made."
        )
    found = list(problems(settings))
    for problem in found:
        print(f"bad: {problem}", file=sys.stderr)
    if found and settings.repair:
        from extract.repair import repair  # loads models: only for those who ask

        for line in repair(settings, found):
            print(f"repaired: {line}")
        found = list(problems(settings))
        for problem in found:
            print(f"still bad: {problem}", file=sys.stderr)
    if found:
        advice = "" if settings.repair else " Run again with repair=true: only the named files are made again."
        print(f"verify: {len(found)} problems in {settings.store}.{advice}")
        sys.exit(1)
    print(f"verify: {settings.store} is whole ({settings.mode}).")


if __name__ == "__main__":
    run(ExtractSettings, main)
