"""Documents -> token shards: `python -m extract.tokens experiment=STUDY`.

Every model of a study reads the same tokens, so they are made once. Token shard i fixes which documents every
activation shard i holds, and in which order. Its index keeps where every source stands after it: a run that died is
continued after its last shard, and ends with the same bytes as one that did not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from extract.archive import finished_shard, read_index, shard_path
from extract.claims import Claims
from extract.command import run
from extract.config import CorpusConfig, ExtractSettings, SourceConfig
from extract.corpus import check_first_documents, check_sources, source_name
from extract.fingerprint import check_unchanged, fingerprints
from extract.interrupts import stops_interrupt
from extract.made_with import read_settings, start_folder
from extract.manifest import ShardEntry
from extract.mapped import MappedShard
from extract.mixing import Mixture, SourceState, content_digest, digest_of
from extract.progress import TokensLog
from extract.publish import publish
from extract.records import check_encoding, hub_commit, is_local, other_splits
from extract.restarts import note_shards
from extract.shards import write_tokens
from extract.stores import TokenDocument, TokenStore
from extract.tokenizer import study_tokenizer, tokenizer_sha256

Commits = dict[str, str]
POLL_S = 1.0  # between looks at whether another process is done


def make_tokens(settings: ExtractSettings, commits: Commits | None = None) -> TokenStore:
    """Write `<store>/tokens` unless it is there; returns it opened. `commits` are those of `commits_of` if not given.

    Raises:
        BadInput: a corpus that cannot be read, another corpus or other settings than the folder was begun with, models
            with different tokenizers.
    """
    folder, corpus = settings.tokens_folder, settings.corpus
    check_sources(corpus)
    tokenizer = study_tokenizer(settings)
    with _alone(settings):
        commits = commits_of(settings) if commits is None else commits
        made_with, corpus = decisive_settings(settings, tokenizer, commits), pinned(corpus, commits)
        _check_begun(settings, corpus, made_with)
        if not (folder / "manifest.json").exists():
            for source in corpus.sources:
                check_encoding(source)
                check_first_documents(source, tokenizer)
                if others := other_splits(source):
                    print(f"source {source_name(source)}: split={source.split} alone, not {', '.join(others)}")
        start_folder(folder, {"tokens_per_shard": corpus.tokens_per_shard, **made_with})
        if not (folder / "manifest.json").exists():
            _write(settings, corpus, tokenizer, made_with)
    store = TokenStore(folder)
    print(f"tokens: {store.num_documents:,} documents, {store.num_tokens:,} tokens in {folder}")
    return store


@contextmanager
def _alone(settings: ExtractSettings) -> Iterator[None]:
    """Begins once the tokens are there, or are this process's to make: of several one does, and the others wait."""
    waiting = False
    with Claims(settings.claims_folder, settings.activations.claim_timeout_s) as claims:
        while not (settings.tokens_folder / "manifest.json").exists() and claims.take("tokens") is None:
            if not waiting:
                print(f"tokens: another process makes {settings.tokens_folder}; waiting for it", flush=True)
            waiting = True
            time.sleep(POLL_S)
        yield


def decisive_settings(settings: ExtractSettings, tokenizer: Any, commits: Commits) -> dict:
    """All that decides the tokens: kept with them, and equal when work on them is continued.

    Where local files lie is none of it: they are told by their names within a source, and by what they hold. The hash
    of the tokenizer speaks for the chat template.
    """
    corpus = settings.corpus
    own = {name: value for name, value in asdict(corpus).items() if name not in ("sources", "chat_template")}
    return {
        "corpus": {**own, "sources": [_decisive_source(source, commits) for source in corpus.sources]},
        "seed": settings.seed if corpus.shuffle_buffer else None,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "files": {source_name(source): fingerprints(source) for source in corpus.sources},
    }


def _decisive_source(source: SourceConfig, commits: Commits) -> dict:
    name = source_name(source)
    own = {**asdict(source), "name": name, "commit": commits.get(name)}
    if is_local(source):
        del own["path"]
    return own


def commits_of(settings: ExtractSettings) -> Commits:
    """The commit of every hub dataset by the name of its source: the one that these tokens were begun with, although
    the dataset has moved on since; for new tokens the one that it has now.
    """
    path = settings.tokens_folder / "settings.json"
    begun = read_settings(path).get("corpus", {}).get("sources", []) if path.exists() else []
    recorded = {(s.get("path"), s.get("revision"), s.get("name")): s.get("commit") for s in begun}
    commits = {}
    for source in settings.corpus.sources:
        if not is_local(source):
            name = source_name(source)
            commits[name] = recorded.get((source.path, source.revision, name)) or hub_commit(source)
    return commits


def pinned(corpus: CorpusConfig, commits: Commits) -> CorpusConfig:
    """The corpus with every hub dataset at its commit."""
    sources = [replace(s, revision=commits.get(source_name(s), s.revision)) for s in corpus.sources]
    return replace(corpus, sources=sources)


def _check_begun(settings: ExtractSettings, corpus: CorpusConfig, made_with: dict) -> None:
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
    if (folder / "manifest.json").exists() or not _is_same_so_far(settings, corpus):
        for name, now in made_with["files"].items():
            check_unchanged(folder, name, files[name], now)
    publish(path, json.dumps({**before, "files": made_with["files"]}, indent=1).encode())


def _is_same_so_far(settings: ExtractSettings, corpus: CorpusConfig) -> bool:
    """Whether the sources still begin with the documents that the finished shards were made from."""
    _, resume = finished_shards(settings.tokens_folder)
    stands = [(source, resume["sources"][source_name(source)]) for source in corpus.sources] if resume else []
    return all(digest_of(corpus, source, settings.seed, s["read"]) == s["digest"] for source, s in stands)


def _write(settings: ExtractSettings, corpus: CorpusConfig, tokenizer: Any, made_with: dict) -> None:
    """Write the shards that are missing, then the manifest."""
    folder = settings.tokens_folder
    names = [source_name(source) for source in corpus.sources]
    finished, resume = finished_shards(folder)
    states = [SourceState(**resume["sources"][name]) for name in names] if resume else None
    seen = contents(folder, finished) if corpus.deduplicate else None
    if finished:
        print(f"{folder}: {len(finished)} shards are there; going on after them")
    mixture = Mixture(corpus, tokenizer, settings.seed, states, seen)

    def stand() -> dict:
        return {"sources": {name: asdict(state) for name, state in zip(names, mixture.states, strict=True)}}

    with closing(_progress(settings, mixture)) as documents:  # no bar after an error's line
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


def _progress(settings: ExtractSettings, mixture: Mixture) -> Generator[TokenDocument, None, None]:
    """The documents of a mixture, counted by a progress bar and in the log."""
    before = sum(state.tokens for state in mixture.states)
    count, tokens = sum(state.kept for state in mixture.states), before
    with (
        TokensLog(settings, before) as log,
        tqdm(total=mixture.corpus.num_tokens, initial=before, unit="tok", unit_scale=True, desc="tokens") as bar,
    ):
        for document in mixture:
            yield document
            count, tokens = count + 1, tokens + len(document.token_ids)
            bar.update(len(document.token_ids))
            log.note(count, tokens)
        log.finished(count, tokens)


def main(settings: ExtractSettings) -> None:
    note_shards(settings.claims_folder, [settings.tokens_folder], settings.max_restarts_without_progress)
    with stops_interrupt():
        make_tokens(settings)


if __name__ == "__main__":
    run(ExtractSettings, main)
