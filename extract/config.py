"""Settings that every command knows: the study, its models, its text, and where its outputs lie.

A dataclass field is a setting, its comment is its documentation, its default is the only default. Experiments
(`configs/experiment/`) and the command line state what differs. Later stages subclass `ExtractSettings` and give their
own sections types.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract.errors import BadInput

DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class ModelConfig:
    """A language model: a hub id or folder, with an optional LoRA adapter merged into it."""

    # Hub id ("google/gemma-2-9b") or a local folder with config.json, tokenizer and weights.
    id: str = ""
    # Branch, tag or commit of a hub model; fix it for a paper.
    revision: str | None = None
    # File name of GGUF weights inside the folder `id`; converted once into a folder beside it.
    gguf: str | None = None
    # Folder or hub id of a LoRA adapter, merged into the weights in float32 before they are rounded to `dtype`.
    adapter: str | None = None
    # Precision of the forward pass: bfloat16, float16 or float32.
    dtype: str = "bfloat16"
    # Attention implementation of transformers (sdpa, eager, ...); null = the architecture's own choice.
    attention: str | None = None


@dataclass
class SourceConfig:
    """One source of documents and its share of the tokens."""

    # A .jsonl or .parquet file, a folder of them, or the name of a Hugging Face dataset ("HuggingFaceFW/fineweb").
    path: str = ""
    # Name that documents carry to the report; empty = the stem of `path`.
    name: str = ""
    # Share of the tokens, relative to the other sources.
    share: float = 1.0
    # Configuration of a Hugging Face dataset, such as "sample-10BT".
    subset: str | None = None
    # Split of a Hugging Face dataset.
    split: str = "train"
    # Field with plain text; used when a record has no messages.
    text_field: str = "text"
    # Field with a list of {"role", "content"} turns, rendered with the chat template of the base model.
    messages_field: str = "messages"


@dataclass
class CorpusConfig:
    """Where the text comes from and how much of it is read."""

    sources: list[SourceConfig] = field(default_factory=list)
    # Tokens to collect over all sources; null = every document once.
    num_tokens: int | None = None
    # Longer documents are cut to this many tokens, BOS included.
    context_length: int = 1024
    # Documents with fewer tokens are left out.
    min_tokens: int = 8
    # Tokens per shard, of tokens and activations alike. One shard is the unit of work, of loss and of repair.
    tokens_per_shard: int = 65536


@dataclass
class ActivationsConfig:
    """How activations are computed and stored."""

    # Tokens in one forward pass, padding included; batches never span shards.
    batch_tokens: int = 8192
    # Device of the language models: auto, cpu, cuda.
    device: str = "auto"


@dataclass
class KeptConfig:
    """Which tokens count, in statistics, training and analysis alike."""

    # Leading positions to leave out: the first token is an attention sink with a norm many times the median.
    skip_first_tokens: int = 1
    # Leave out tokens whose norm in any model exceeds this multiple of that model's mean norm over later positions.
    max_norm_ratio: float = 10.0


@dataclass
class ExtractSettings:
    """The settings of `python -m extract.*`, and the part that all commands share."""

    # Name of the study; its outputs lie under outputs/STUDY.
    study: str = ""
    # The pair that is compared; null = all of `pairs`.
    pair: str | None = None
    # Pairs of model names, [base, tuned], by the name of the pair.
    pairs: dict[str, list[str]] = field(default_factory=dict)
    # Every model of the study by its name. `models.NAME=ID` is short for `models.NAME.id=ID`.
    models: dict[str, ModelConfig] = field(default_factory=dict)
    # Residual stream after this block, counted from 0, such as block20.
    hookpoint: str = ""
    # Every hookpoint to extract in one pass.
    hookpoints: list[str] = field(default_factory=lambda: ["${hookpoint}"])
    # Orders documents, draws initial weights and shuffles tokens.
    seed: int = 0
    # Folder of everything that the study writes.
    outputs: str = "outputs/${study}"
    # Folder of tokens and activations.
    store: str = "${outputs}/store"
    # `corpus=PATH` is short for `corpus.sources=[{path: PATH}]`.
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    kept: KeptConfig = field(default_factory=KeptConfig)
    # How thoroughly extract.verify looks: fast (sizes, indexes, manifests) or full (hashes, decoding, finite values,
    # alignment).
    mode: str = "fast"
    # The command line that this was composed from; filled in by the command.
    composed_from: list[str] = field(default_factory=list)
    # Sections of later stages, checked by the commands that own them.
    crosscoder: Any = None
    training: Any = None
    data: Any = None
    engine: Any = None
    tracking: Any = None
    analysis: Any = None

    def check(self) -> None:
        """Cross-checks that need no file; BadInput with the setting, its value and the remedy."""
        if not self.study:
            raise BadInput(
                "study is not set. Select an experiment: experiment=demo, or experiment=pair for two models of your "
                "own."
            )
        if self.mode not in ("fast", "full"):
            raise BadInput(f"mode={self.mode} is neither fast nor full.")
        self._check_models()
        self._check_pairs()
        for hookpoint in [self.hookpoint, *self.hookpoints]:
            block_of(hookpoint)
        if not self.hookpoints:
            raise BadInput("hookpoints=[] names no block. Leave it out, or give a list such as [block10,block20].")
        self._check_corpus()
        if self.activations.batch_tokens < 1:
            raise BadInput(f"activations.batch_tokens={self.activations.batch_tokens} must be at least 1.")
        if self.kept.skip_first_tokens < 0 or self.kept.max_norm_ratio <= 1:
            raise BadInput(
                f"kept.skip_first_tokens={self.kept.skip_first_tokens} must be >= 0 and "
                f"kept.max_norm_ratio={self.kept.max_norm_ratio} > 1."
            )

    def _check_corpus(self) -> None:
        corpus = self.corpus
        for name in ("num_tokens", "context_length", "min_tokens", "tokens_per_shard"):
            value = getattr(corpus, name)
            if value is not None and value < 1:
                raise BadInput(f"corpus.{name}={value} must be at least 1.")
        for source in corpus.sources:
            if not source.share > 0:
                raise BadInput(
                    f"corpus.sources: {source.path} has share={source.share}. Give a positive share, or leave the "
                    f"source out."
                )

    def _check_models(self) -> None:
        for name, model in self.models.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise BadInput(
                    f"models.{name}: a model's name is made of letters, digits, '_', '-' and '.': it names files "
                    f"and columns."
                )
            if not model.id:
                raise BadInput(f"models.{name} is not set. Give a hub id or a folder: models.{name}=ID.")
            if model.dtype not in DTYPES:
                raise BadInput(f"models.{name}.dtype={model.dtype} is not one of {', '.join(DTYPES)}.")

    def _check_pairs(self) -> None:
        for pair, members in self.pairs.items():
            unknown = [name for name in members if name not in self.models]
            if unknown or len(set(members)) < 2:
                raise BadInput(
                    f"pairs.{pair}={members} must name two or more different models of {sorted(self.models)}."
                )
        if self.pair is not None and self.pair not in self.pairs:
            raise BadInput(f"pair={self.pair} is not one of {sorted(self.pairs)}.")

    @property
    def tokens_folder(self) -> Path:
        return Path(self.store) / "tokens"

    def activations_folder(self, model: str, hookpoint: str) -> Path:
        return Path(self.store) / "activations" / model / hookpoint

    @property
    def needed_models(self) -> list[str]:
        """Names of the models of the selected pair, or of all pairs."""
        return list(dict.fromkeys(name for members in self.needed_pairs.values() for name in members))

    @property
    def needed_pairs(self) -> dict[str, list[str]]:
        """The selected pair, or all."""
        return self.pairs if self.pair is None else {self.pair: self.pairs[self.pair]}


def block_of(hookpoint: str) -> int:
    """Block index of a hookpoint: "block20" -> 20."""
    match = re.fullmatch(r"block(\d+)", hookpoint)
    if not match:
        raise BadInput(
            f"hookpoint={hookpoint!r} is not a block. Write block and its number, counted from 0: hookpoint=block20."
        )
    return int(match[1])
