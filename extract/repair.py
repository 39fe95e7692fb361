"""Making the bad files of a store again, and only those: `python -m extract.verify ... repair=true`.

Activations are computed again from the tokens, by the extraction itself. Tokens come from the corpus: they are made
beside the store, and taken from there only if they are the very tokens that the activations belong to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from extract.activations import ModelShards, extract
from extract.archive import shard_path
from extract.claims import Claims
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.mirror import DISABLED
from extract.publish import publish
from extract.stores import TokenStore
from extract.tokens import commits_of, make_tokens
from extract.verify import Problem, folders_of, readable_manifest


def repair(settings: ExtractSettings, found: Sequence[Problem]) -> Iterator[str]:
    """Mend what `problems` found; yields a line for every file that was made again.

    Raises:
        BadInput: the shards were made with other settings, or the corpus gives other tokens now; nothing is deleted.
    """
    by_folder = {folder: [p for p in found if p.path.parent == folder] for folder in folders_of(settings)}
    before = {folder: readable_manifest(folder) for folder in by_folder}
    for folder, manifest in before.items():
        if manifest and any(problem.path.name == "settings.json" for problem in by_folder[folder]):
            publish(folder / "settings.json", json.dumps(manifest.settings, indent=1).encode())
            yield f"{folder / 'settings.json'}, from the manifest"
    tokens_folder = settings.tokens_folder
    bad_tokens = by_folder.pop(tokens_folder)
    if any(problem.path.name != "settings.json" for problem in bad_tokens):
        yield from _repair_tokens(settings, bad_tokens, _recorded_tokens(before, tokens_folder))
    bad = {folder: [p for p in problems if p.path.name != "settings.json"] for folder, problems in by_folder.items()}
    if any(bad.values()):
        yield from _repair_activations(settings, bad, before)


def _repair_activations(
    settings: ExtractSettings, bad: dict[Path, list[Problem]], before: dict[Path, Manifest | None]
) -> Iterator[str]:
    tokens = TokenStore(settings.tokens_folder)
    with Claims(settings.claims_folder, settings.activations.claim_timeout_s) as claims:
        for name in settings.needed_models:  # refuses other settings before anything is deleted
            ModelShards(settings, tokens, name).start(claims)
    for folder, problems in bad.items():
        if problems:
            (folder / "manifest.json").unlink(missing_ok=True)
        for number in _shards(problems):
            shard_path(folder, number).with_suffix(".index").unlink(missing_ok=True)
            shard_path(folder, number).unlink(missing_ok=True)
    extract(settings)
    for folder, problems in bad.items():
        now = Manifest.read(folder)
        for number in _shards(problems):
            old = before[folder]
            same = old is not None and old.shards[number] == now.shards[number]
            note = "the same bytes as before" if same else "whether it has the same bytes as before is not known"
            if old is not None and not same:
                note = "other bytes than before, as from other hardware, versions or thread counts"
            yield f"{shard_path(folder, number)} ({note})"
        if problems and not _shards(problems):
            yield str(folder / "manifest.json")


def _shards(problems: Sequence[Problem]) -> list[int]:
    return sorted({problem.shard for problem in problems if problem.shard is not None})


def _recorded_tokens(manifests: dict[Path, Manifest | None], tokens_folder: Path) -> str | None:
    """The hash of the tokens that the store was made with: of their own manifest, or as the activations noted it."""
    own = manifests[tokens_folder]
    if own is not None:
        return own.content_sha256()
    return next((manifest.tokens_sha256 for manifest in manifests.values() if manifest is not None), None)


def _repair_tokens(settings: ExtractSettings, bad: Sequence[Problem], recorded: str | None) -> Iterator[str]:
    """Make all tokens again beside the store, and take the bad files from there if the whole is what it was."""
    folder = settings.tokens_folder
    untracked = replace(settings.tracking, mode=DISABLED)
    beside = replace(settings, store=str(folder.with_name("tokens.repair")), tracking=untracked)
    if recorded is None:
        raise BadInput(
            f"{folder} is damaged, and no manifest says which tokens it held. Bring it back from a copy, or delete "
            f"{settings.store} and run python -m extract.tokens and extract.activations again."
        )
    shutil.rmtree(beside.store, ignore_errors=True)
    try:
        if make_tokens(beside, commits_of(settings)).manifest.content_sha256() != recorded:
            raise BadInput(
                f"{folder} is damaged, and the corpus gives other tokens now than those that the store was made with. "
                f"Bring the corpus or the damaged files back from a copy, or delete {settings.store} and start again."
            )
        for name in sorted({file for problem in bad for file in _files_of(problem)}):
            (beside.tokens_folder / name).replace(folder / name)
            yield f"{folder / name} (the same bytes as before)"
    finally:
        shutil.rmtree(beside.store, ignore_errors=True)


def _files_of(problem: Problem) -> list[str]:
    """The names of the files to replace: a shard's archive and index belong together."""
    if problem.shard is None:
        return [] if problem.path.name == "settings.json" else [problem.path.name]
    archive = shard_path(Path(), problem.shard)
    return [archive.name, archive.with_suffix(".index").name]
