"""Documents -> token shards: `python -m extract.tokens experiment=STUDY`.

Every model of a study reads the same tokens, so they are made once. Token shard i fixes which documents every
activation shard i holds, and in which order. Its index keeps where every source stands after it: a run that died is
continued after its last shard, and ends with the same bytes as one that did not.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from extract.archive import MappedShard, finished_shard, read_index, read_settings, shard_path, start_folder
from extract.command import run
from extract.config import ExtractSettings
from extract.corpus import check_first_documents, check_sources, source_name
from extract.fingerprint import check_unchanged, fingerprints
from extract.manifest import ShardEntry
from extract.mixing import Mixture, SourceState, content_digest, digest_of
from extract.publish import publish
from extract.records import check_encoding
from extract.shards import write_tokens
from extract.stores import TokenDocument, TokenStore
from extract.tokenizer import study_tokenizer, tokenizer_sha256


def make_tokens(settings: ExtractSettings) -> TokenStore:
    """Write `<store>/tokens` unless it is there; returns it opened.

    Raises:
        BadInput: a corpus that cannot be read, another corpus or other settings than the folder was begun with, models
            with different tokenizers.
    """
    folder, corpus = settings.tokens_folder, settings.corpus
    check_sources(corpus)
    tokenizer = study_tokenizer(settings)
    made_with = decisive_settings(settings, tokenizer)
    _check_begun(settings, made_with)
    if not (folder / "manifest.json").exists():
        for source in corpus.sources:
            check_encoding(source)
            check_first_documents(source, tokenizer)
    start_folder(folder, {"tokens_per_shard": corpus.tokens_per_shard, **made_with})
    if not (folder / "manifest.json").exists():
        _write(settings, tokenizer, made_with)
    store = TokenStore(folder)
    print(f"tokens: {store.num_documents:,} documents, {store.num_tokens:,} tokens in {folder}")
    return store


def decisive_settings(settings: ExtractSettings, tokenizer: Any) -> dict:
    """All that decides the tokens: kept with them, and equal when work on them is continued."""
    corpus = settings.corpus
    return {
        "corpus": asdict(corpus),
        "seed": settings.seed if corpus.shuffle_buffer else None,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "files": {file: entry for source in corpus.sources for file, entry in fingerprints(source).items()},
    }


def _check_begun(settings: ExtractSettings, made_with: dict) -> None:
    """BadInput when there are tokens of the same sources, but their files have changed since.

    A change behind all that was read is none: a mistake in the middle of a corpus can be mended, and the shards before
    it are kept.
    """
    folder = settings.tokens_folder
    path = folder / "settings.json"
    if not path.exists() or not any(folder.glob("shard-*.tar")):
        return
    before = read_settings(path)
    files = before.get("files", {})
    if before.get("corpus") != made_with["corpus"] or files == made_with["files"]:
        return
    if (folder / "manifest.json").exists() or not _is_same_so_far(settings):
        check_unchanged(folder, files, made_with["files"])
    publish(path, json.dumps({**before, "files": made_with["files"]}, indent=1).encode())


def _is_same_so_far(settings: ExtractSettings) -> bool:
    """Whether the sources still begin with the documents that the finished shards were made from."""
    corpus, (_, resume) = settings.corpus, finished_shards(settings.tokens_folder)
    stands = [(source, resume["sources"][source_name(source)]) for source in corpus.sources] if resume else []
    return all(digest_of(corpus, source, settings.seed, s["read"]) == s["digest"] for source, s in stands)


def _write(settings: ExtractSettings, tokenizer: Any, made_with: dict) -> None:
    """Write the shards that are missing, then the manifest."""
    folder, corpus = settings.tokens_folder, settings.corpus
    names = [source_name(source) for source in corpus.sources]
    finished, resume = finished_shards(folder)
    states = [SourceState(**resume["sources"][name]) for name in names] if resume else None
    seen = contents(folder, finished) if corpus.deduplicate else None
    if finished:
        print(f"{folder}: {len(finished)} shards are there; going on after them")
    mixture = Mixture(corpus, tokenizer, settings.seed, states, seen)

    def stand() -> dict:
        return {"sources": {name: asdict(state) for name, state in zip(names, mixture.states, strict=True)}}

    with closing(_progress(mixture)) as documents:  # no bar after an error's line
        write_tokens(
            settings.store, documents, made_with, corpus.tokens_per_shard, asdict(settings), finished, resume=stand
        )
    total = sum(state.tokens for state in mixture.states)
    for name, state in zip(names, mixture.states, strict=True):
        print(f"source {name}: {state.tokens / total:.1%} of the tokens; {state}")


def finished_shards(folder: Path) -> tuple[list[ShardEntry], dict | None]:
    """The shards that an earlier run published, up to the first that is missing, and where its sources stood then."""
    entries: list[ShardEntry] = []
    resume = None
    while entry := finished_shard(path := shard_path(folder, len(entries))):
        stand = read_index(path.with_suffix(".index")).get("resume")
        if stand is None:
            break
        entries.append(entry)
        resume = stand
    return entries, resume


def contents(folder: Path, entries: list[ShardEntry]) -> set[bytes]:
    """The content digests of all documents in these shards."""
    found = set()
    for entry in entries:
        shard = MappedShard(folder, entry)
        for key, _ in shard.index["documents"]:
            document = json.loads(shard.read(f"{key}.json"))
            found.add(content_digest(document["content_sha256"]))
    return found


def _progress(mixture: Mixture) -> Generator[TokenDocument, None, None]:
    """The documents of a mixture, counted by a progress bar."""
    before = sum(state.tokens for state in mixture.states)
    with tqdm(total=mixture.corpus.num_tokens, initial=before, unit="tok", unit_scale=True, desc="tokens") as bar:
        for document in mixture:
            yield document
            bar.update(len(document.token_ids))


def main(settings: ExtractSettings) -> None:
    make_tokens(settings)


if __name__ == "__main__":
    run(ExtractSettings, main)
