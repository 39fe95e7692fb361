"""Documents -> token shards: `python -m extract.tokens experiment=STUDY`.

Every model of a study reads the same tokens, so they are made once. Token shard i fixes which documents every
activation shard i holds, and in which order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from extract.archive import start_folder
from extract.command import run
from extract.config import CorpusConfig, ExtractSettings
from extract.corpus import Document, check_encoding, check_source, read_source, source_name
from extract.errors import BadInput
from extract.models import load_tokenizer
from extract.shards import write_tokens
from extract.stores import TokenDocument, TokenStore


def make_tokens(settings: ExtractSettings) -> TokenStore:
    """Write `<store>/tokens` unless it is there; returns it opened."""
    folder, corpus = settings.tokens_folder, settings.corpus
    if not corpus.sources:
        raise BadInput(
            "corpus has no sources. Give corpus=PATH: a .jsonl or .parquet file, a folder of them, or a dataset's name."
        )
    for source in corpus.sources:
        check_source(source)
    tokenizer = study_tokenizer(settings)
    made_with = {"corpus": asdict(corpus), "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    if not (folder / "manifest.json").exists():
        for source in corpus.sources:
            check_encoding(source)
    start_folder(folder, {"tokens_per_shard": corpus.tokens_per_shard, **made_with})
    if not (folder / "manifest.json").exists():
        with closing(_progress(mixed(corpus, tokenizer), corpus)) as documents:  # no bar after an error's line
            write_tokens(settings.store, documents, made_with, corpus.tokens_per_shard, asdict(settings))
    store = TokenStore(folder)
    print(f"tokens: {store.num_documents:,} documents, {store.num_tokens:,} tokens in {folder}")
    return store


def mixed(corpus: CorpusConfig, tokenizer: Any) -> Iterator[TokenDocument]:
    """Documents of all sources, interleaved so that their shares of the tokens are kept at every point.

    The next document comes from the source with the smallest (tokens taken) / share. With `num_tokens` each source
    gives exactly its share of them, the last document cut to fit; without, every document comes once.

    Raises:
        BadInput: a source that holds less than its share, or nothing.
    """
    total_share = sum(source.share for source in corpus.sources)
    streams = [encode(corpus, tokenizer, read_source(source)) for source in corpus.sources]
    budgets = _budgets(corpus, total_share)
    taken = [0] * len(streams)
    open_sources = [i for i, budget in enumerate(budgets) if budget is None or budget > 0]
    while open_sources:
        i = min(open_sources, key=lambda j: taken[j] / corpus.sources[j].share)
        document, budget = next(streams[i], None), budgets[i]
        if document is None and budget is not None:
            name = source_name(corpus.sources[i])
            raise BadInput(
                f"corpus source {name} holds {taken[i]} tokens; its share of corpus.num_tokens={corpus.num_tokens} "
                f"is {budget}. "
                "Lower num_tokens or its share, or set num_tokens=null."
            )
        if document is None and not taken[i]:
            raise BadInput(
                f"corpus source {corpus.sources[i].path} holds no document of corpus.min_tokens={corpus.min_tokens} or "
                f"more tokens. Check the file, or lower min_tokens."
            )
        if document is None:
            open_sources.remove(i)
            continue
        if budget is not None:
            document = cut(document, min(len(document.token_ids), budget - taken[i]))
        taken[i] += len(document.token_ids)
        if budget is not None and taken[i] == budget:
            open_sources.remove(i)
        yield document


def _budgets(corpus: CorpusConfig, total_share: float) -> list[int | None]:
    """Tokens of each source, summing to num_tokens exactly: cumulative shares are rounded, not each share."""
    if corpus.num_tokens is None:
        return [None] * len(corpus.sources)
    cumulative = np.cumsum([source.share for source in corpus.sources]) / total_share
    edges = np.rint(cumulative * corpus.num_tokens).astype(int)
    return [int(budget) for budget in np.diff(edges, prepend=0)]


def encode(corpus: CorpusConfig, tokenizer: Any, documents: Iterator[Document]) -> Iterator[TokenDocument]:
    """Token documents of at least `min_tokens`, cut to `context_length`."""
    for document in documents:
        encoded = encode_chat(tokenizer, document) if document.messages else encode_text(tokenizer, document)
        if len(encoded.token_ids) >= corpus.min_tokens:
            yield cut(encoded, corpus.context_length)


def encode_text(tokenizer: Any, document: Document) -> TokenDocument:
    """Plain text, with the special tokens that the tokenizer adds by itself (BOS for most models)."""
    token_ids = np.array(tokenizer(document.text)["input_ids"], dtype=np.uint32)
    return TokenDocument("", document.doc_id, document.source, token_ids, text=document.text, tags=document.tags)


def encode_chat(tokenizer: Any, document: Document) -> TokenDocument:
    """A chat rendered with the tokenizer's template (which brings its own BOS), with the token span of every turn's
    content.
    """
    if not tokenizer.chat_template:
        raise BadInput(
            f"document {document.doc_id} of {document.source} is a chat, but no model of the study has a chat "
            f"template. "
            "Add a model that has one, or give plain text."
        )
    rendered = tokenizer.apply_chat_template(document.messages, tokenize=False)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    token_ids = np.array(encoded["input_ids"], dtype=np.uint32)
    roles = role_spans(rendered, document.messages or [], encoded["offset_mapping"])
    return TokenDocument(
        "", document.doc_id, document.source, token_ids, messages=document.messages, roles=roles, tags=document.tags
    )


def role_spans(
    rendered: str, messages: list[dict[str, str]], offsets: list[tuple[int, int]]
) -> list[tuple[str, int, int]]:
    """(role, first token, one past the last token) of each turn's content, found in order in the rendered chat.

    A token belongs to a content when it lies wholly inside its characters. A content that the template altered (trimmed
    beyond white space, say) has no span: its tokens count as the template's.
    """
    spans, position = [], 0
    for turn in messages:
        content = turn["content"].strip()
        start = rendered.find(content, position)
        if start < 0 or not content:
            continue
        position = start + len(content)
        inside = [i for i, (first, last) in enumerate(offsets) if start <= first < last <= position]
        if inside:
            spans.append((turn["role"], inside[0], inside[-1] + 1))
    return spans


def cut(document: TokenDocument, length: int) -> TokenDocument:
    """The first `length` tokens, role spans clipped."""
    document.token_ids = document.token_ids[:length]
    document.roles = [(role, start, min(end, length)) for role, start, end in document.roles if start < length]
    return document


def study_tokenizer(settings: ExtractSettings) -> Any:
    """The tokenizer of the study: of the first model that has a chat template (base models often lack one), else of the
    first. All models of the study are asked, whichever pair is selected: every pair reads the same tokens.

    Raises:
        BadInput: two models with different vocabularies; their activations could not be compared token by token.
    """
    places = {(model.id, model.revision, model.gguf): name for name, model in reversed(settings.models.items())}
    names = [name for name in settings.models if name in places.values()]  # one name for each set of files
    tokenizers = [load_tokenizer(name, settings.models[name]) for name in names]
    vocabulary = tokenizers[0].get_vocab()
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        different = set(vocabulary.items()) ^ set(tokenizer.get_vocab().items())
        if different:
            example = sorted(token for token, _ in different)[:3]
            raise BadInput(
                f"models.{names[0]} and models.{name} have different tokenizers ({len(different)} entries differ, "
                f"such as {example})."
            )
    return next((tokenizer for tokenizer in tokenizers if tokenizer.chat_template), tokenizers[0])


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of the vocabulary and the chat template: equal for models that read the same tokens."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _progress(documents: Iterator[TokenDocument], corpus: CorpusConfig) -> Generator[TokenDocument, None, None]:
    """The same documents, counted by a progress bar that ends by saying what each source gave."""
    given: dict[str, int] = {}
    with tqdm(total=corpus.num_tokens, unit="tok", unit_scale=True, desc="tokens") as bar:
        for document in documents:
            yield document
            bar.update(len(document.token_ids))
            given[document.source] = given.get(document.source, 0) + len(document.token_ids)
    total = sum(given.values())
    print(f"sources: {', '.join(f'{name} {tokens / total:.1%}' for name, tokens in given.items())}")


def main(settings: ExtractSettings) -> None:
    make_tokens(settings)


if __name__ == "__main__":
    run(ExtractSettings, main)
