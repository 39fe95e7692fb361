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
from extract.mirror import TrackingConfig
from extract.remote import local_folder

# Precisions of the forward pass, and the codec that stores each as it is.
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CODECS = (*DTYPES.values(), "fp8", "int8")


@dataclass
class ModelConfig:
    """A language model: a hub id or folder, with an optional LoRA adapter merged into it."""

    # Hub id ("google/gemma-2-9b") or a local folder with config.json, tokenizer and weights.
    id: str = ""
    # Branch, tag or commit of a hub model; fix it for a paper.
    revision: str | None = None
    # File name of GGUF weights inside the folder `id`; converted once into a folder beside it, in bfloat16.
    gguf: str | None = None
    # Folder or hub id of a LoRA adapter, merged into the weights in float32 before they are rounded to `dtype`.
    adapter: str | None = None
    # Branch, tag or commit of a hub adapter; fix it for a paper.
    adapter_revision: str | None = None
    # Precision of the forward pass: bfloat16, float16 or float32.
    dtype: str = "bfloat16"
    # Attention implementation of transformers (sdpa, eager, flash_attention_2, ...); null = the architecture's own
    # choice, and eager where attention logits are soft-capped (Gemma-2).
    attention: str | None = None
    # auto = one model spread over all GPUs that the process sees, for models larger than one GPU; start one process a
    # node then. null = the whole model on one device.
    device_map: str | None = None
    # Width of the residual stream, for `python -m train.plan` before the model is at hand; checked where it is loaded.
    d_model: int | None = None


@dataclass
class SourceConfig:
    """One source of documents and its share of the tokens."""

    # A .jsonl, .jsonl.zst or .parquet file, a folder of them, the name of a Hugging Face dataset
    # ("HuggingFaceFW/fineweb"), or a folder that its library loads (save_to_disk included).
    path: str = ""
    # Name that documents carry to the report, one for each source; empty = the stem of `path`.
    name: str = ""
    # Share of the tokens, relative to the other sources.
    share: float = 1.0
    # Configuration of a Hugging Face dataset, such as "sample-10BT".
    subset: str | None = None
    # Split of a Hugging Face dataset, or of a folder whose files name splits as those of datasets do (test.jsonl,
    # data/train_sft-00000-of-00003.parquet); files that name none are of the split train.
    split: str = "train"
    # Branch, tag or commit of a Hugging Face dataset; tokens note the commit that it stands for when they are begun.
    revision: str | None = None
    # Field with plain text; used when a record has no messages.
    text_field: str = "text"
    # Field with a list of {"role", "content"} turns, rendered with the chat template.
    messages_field: str = "messages"
    # Field that names a document to the report; where a record lacks it, the name is SOURCE/NUMBER.
    id_field: str = "doc_id"
    # Field that holds a record's language; read only when `languages` are given.
    language_field: str = "language"
    # Languages to keep, written as the records write them; [] = all.
    languages: list[str] = field(default_factory=list)


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
    # Documents with more tokens are left out rather than cut; null = none.
    max_tokens: int | None = None
    # Leave out a document whose text or turns have come before, exactly and in any source.
    deduplicate: bool = False
    # Documents are drawn in random order, decided by `seed`, from windows of this many; 0 = in file order.
    shuffle_buffer: int = 0
    # File with a Jinja chat template; null = that of the first model that has one.
    chat_template: str | None = None
    # Tokens per shard, of tokens and activations alike. One shard is the unit of work, of loss and of repair.
    tokens_per_shard: int = 65536


@dataclass
class ActivationsConfig:
    """How activations are computed and stored."""

    # Tokens in one forward pass, padding included; batches never span shards.
    batch_tokens: int = 8192
    # How values are stored: bf16, fp16, fp32, fp8 or int8 (both with a scale per token); null = the model's own dtype.
    codec: str | None = None
    # Device of the language models: auto (a GPU where there is one; with several, worker i of a node takes GPU i), cpu,
    # cuda, cuda:1.
    device: str = "auto"
    # A worker of another host that gave no sign of life for so many seconds is dead: its shards are taken over. On
    # this host a dead process is seen at once. Network file systems show times up to a minute late: keep it above 120.
    claim_timeout_s: float = 300.0
    # Stay when all that is missing is in the hands of other workers, to take over from those that die; false = leave.
    wait: bool = True


@dataclass
class KeptConfig:
    """Which tokens count, in statistics, training and analysis alike."""

    # Leading positions to leave out: the first token is an attention sink with a norm many times the median.
    skip_first_tokens: int = 1
    # Leave out tokens whose norm in any model exceeds this multiple of that model's mean norm over later positions.
    max_norm_ratio: float = 10.0


@dataclass(frozen=True)
class Place:
    """Where activations are taken: a model of the study and one of its hookpoints."""

    model: str
    hookpoint: str


@dataclass
class ExtractSettings:
    """The settings of `python -m extract.*`, and the part that all commands share."""

    # Name of the study; its outputs lie under outputs/STUDY.
    study: str = ""
    # The pair that is compared; null = all of `pairs`.
    pair: str | None = None
    # Pairs of model names, [base, tuned], by the name of the pair. MODEL@HOOKPOINT is a model at a hookpoint of its
    # own: [base@block10, base@block20] compares two layers of one model.
    pairs: dict[str, list[str]] = field(default_factory=dict)
    # Every model of the study by its name. `models.NAME=ID` is short for `models.NAME.id=ID`.
    models: dict[str, ModelConfig] = field(default_factory=dict)
    # Residual stream after this block, counted from 0, such as block20, for members of pairs that name none.
    hookpoint: str = ""
    # Hookpoints to extract of every model in one pass, beside those that pairs name; [] = what the pairs need.
    hookpoints: list[str] = field(default_factory=list)
    # Orders documents, draws initial weights and shuffles tokens.
    seed: int = 0
    # Folder of everything that the study writes.
    outputs: str = "outputs/${study}"
    # Folder of tokens and activations; for reading also a URL, such as s3://BUCKET/store (extract/remote.py).
    store: str = "${outputs}/store"
    # `corpus=PATH` is short for `corpus.sources=[{path: PATH}]`.
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    kept: KeptConfig = field(default_factory=KeptConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    # How thoroughly extract.verify looks: fast (sizes, indexes, manifests) or full (hashes, decoding, finite values,
    # alignment).
    mode: str = "fast"
    # extract.verify makes bad shards again, and only those.
    repair: bool = False
    # extract.status shows its view again every few seconds until the store is complete.
    watch: bool = False
    # A job of Slurm that is requeued more often than this without getting any further is refused.
    max_restarts_without_progress: int = 3
    # The command line that this was composed from; filled in by the command.
    composed_from: list[str] = field(default_factory=list)
    # Sections of later stages, checked by the commands that own them.
    crosscoder: Any = None
    training: Any = None
    data: Any = None
    engine: Any = None
    sweep: Any = None
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
        for hookpoint in [self.hookpoint, *self.hookpoints]:
            block_of(hookpoint)
        self._check_pairs()
        self._check_corpus()
        self._check_activations()
        self.tracking.check()
        if self.kept.skip_first_tokens < 0 or self.kept.max_norm_ratio <= 1:
            raise BadInput(
                f"kept.skip_first_tokens={self.kept.skip_first_tokens} must be >= 0 and "
                f"kept.max_norm_ratio={self.kept.max_norm_ratio} > 1."
            )

    def _check_corpus(self) -> None:
        corpus = self.corpus
        for name in ("num_tokens", "context_length", "min_tokens", "max_tokens", "tokens_per_shard"):
            value = getattr(corpus, name)
            if value is not None and value < 1:
                raise BadInput(f"corpus.{name}={value} must be at least 1.")
        if corpus.max_tokens is not None and corpus.max_tokens < corpus.min_tokens:
            raise BadInput(
                f"corpus.max_tokens={corpus.max_tokens} is below corpus.min_tokens={corpus.min_tokens}: no document "
                f"fits. Raise the one or lower the other."
            )
        if corpus.shuffle_buffer < 0:
            raise BadInput(f"corpus.shuffle_buffer={corpus.shuffle_buffer} must be at least 0, the order of the files.")
        for source in corpus.sources:
            if not source.share > 0:
                raise BadInput(
                    f"corpus.sources: {source.path} has share={source.share}. Give a positive share, or leave the "
                    f"source out."
                )

    def _check_activations(self) -> None:
        activations = self.activations
        if activations.batch_tokens < 1:
            raise BadInput(f"activations.batch_tokens={activations.batch_tokens} must be at least 1.")
        if not activations.claim_timeout_s > 0:
            raise BadInput(f"activations.claim_timeout_s={activations.claim_timeout_s} must be above 0.")
        if activations.codec is not None and activations.codec not in CODECS:
            raise BadInput(f"activations.codec={activations.codec} is not one of {', '.join(CODECS)}.")

    def _check_models(self) -> None:
        for name, model in self.models.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise BadInput(
                    f"models.{name}: a model's name is made of letters, digits, '_', '-' and '.': it names files "
                    f"and columns."
                )
            if not model.id:
                raise BadInput(f"models.{name} is not set. Give a hub id or a folder: models.{name}=ID.")
            if model.adapter_revision is not None and model.adapter is None:
                raise BadInput(
                    f"models.{name}.adapter_revision={model.adapter_revision} needs models.{name}.adapter, a hub id."
                )
            if model.dtype not in DTYPES:
                raise BadInput(f"models.{name}.dtype={model.dtype} is not one of {', '.join(DTYPES)}.")
            if model.device_map not in (None, "auto"):
                raise BadInput(f"models.{name}.device_map={model.device_map} is neither null nor auto.")

    def _check_pairs(self) -> None:
        for pair, members in self.pairs.items():
            places = [self.place(member) for member in members]
            unknown = [place.model for place in places if place.model not in self.models]
            if unknown or len(set(places)) < max(2, len(places)):
                raise BadInput(
                    f"pairs.{pair}={members} must name two or more different models of {sorted(self.models)}, or "
                    f"different hookpoints of them: MODEL@HOOKPOINT, such as base@block10 (without @, it is "
                    f"hookpoint={self.hookpoint})."
                )
            for place in places:
                block_of(place.hookpoint, f"pairs.{pair}: hookpoint")
        if self.pair is not None and self.pair not in self.pairs:
            raise BadInput(f"pair={self.pair} is not one of {sorted(self.pairs)}.")

    @property
    def tokens_folder(self) -> Path:
        return local_folder(self.store, "tokens")

    @property
    def claims_folder(self) -> Path:
        """Which worker has which shard, while workers run."""
        return Path(self.store) / "claims"

    def activations_folder(self, model: str, hookpoint: str) -> Path:
        return local_folder(self.store, "activations", model, hookpoint)

    def place(self, member: str) -> Place:
        """What a member of a pair stands for: MODEL at `hookpoint`, or MODEL@HOOKPOINT."""
        model, hookpoint = split_member(member)
        return Place(model, self.hookpoint if hookpoint is None else hookpoint)

    def hookpoints_of(self, model: str) -> list[str]:
        """The hookpoints to extract of a model: `hookpoints` and those that the needed pairs name, or all they need."""
        members = [member for members in self.needed_pairs.values() for member in members]
        needed = [self.place(member) for member in members if split_member(member)[1] or not self.hookpoints]
        return list(dict.fromkeys([*self.hookpoints, *(place.hookpoint for place in needed if place.model == model)]))

    @property
    def needed_models(self) -> list[str]:
        """Names of the models of the selected pair, or of all pairs."""
        members = [member for members in self.needed_pairs.values() for member in members]
        return list(dict.fromkeys(self.place(member).model for member in members))

    @property
    def needed_pairs(self) -> dict[str, list[str]]:
        """The selected pair, or all."""
        return self.pairs if self.pair is None else {self.pair: self.pairs[self.pair]}


def split_member(member: str) -> tuple[str, str | None]:
    """Model and hookpoint of a member of a pair: "base@block20" -> ("base", "block20"), "base" -> ("base", None)."""
    model, at, hookpoint = member.partition("@")
    return model, hookpoint if at else None


def block_of(hookpoint: str, name: str = "hookpoint") -> int:
    """Block index of a hookpoint: "block20" -> 20; BadInput, for the setting `name`, where there is none."""
    match = re.fullmatch(r"block(\d+)", hookpoint)
    if not match:
        raise BadInput(
            f"{name}={hookpoint!r} is not a block. Write block and its number, counted from 0, such as block20."
        )
    return int(match[1])
