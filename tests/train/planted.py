"""Synthetic stores and settings for the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.config import ModelConfig
from extract.mirror import TrackingConfig
from extract.shards import write_activations, write_tokens
from extract.stores import TokenDocument
from train.config import CrosscoderConfig, DataConfig, TrainingConfig, TrainSettings

HOOKPOINT = "block3"


def write_documents(store: Path, lengths: list[int], texts: list[str] | None = None) -> None:
    texts = texts or [f"document number {i}" for i in range(len(lengths))]
    documents = (
        TokenDocument(key="", doc_id=f"d{i}", source="s", token_ids=np.arange(n), text=text)
        for i, (n, text) in enumerate(zip(lengths, texts, strict=True))
    )
    write_tokens(store, documents, tokens_per_shard=100)


def write_model(store: Path, model: str, lengths: list[int], acts: Callable[[int, int], Tensor], skip: int = 1) -> None:
    """`acts(document, length)` gives the (N, D) activations of a document."""
    documents = ((f"{i:09d}", acts(i, n)) for i, n in enumerate(lengths))
    write_activations(store, model, HOOKPOINT, documents, skip_first_tokens=skip)


def random_store(store: Path, num_documents: int = 40, d_model: int = 6, seed: int = 0) -> list[int]:
    """Two models of bf16 noise: the tuned one is the base plus a little. Returns the lengths of the documents."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (num_documents,), generator=generator).tolist()
    base = [torch.randn(n, d_model, generator=generator) for n in lengths]
    noise = [torch.randn(n, d_model, generator=generator) for n in lengths]
    write_documents(store, lengths)
    write_model(store, "base", lengths, lambda i, n: (3 * base[i]).bfloat16())
    write_model(store, "tuned", lengths, lambda i, n: (5 * base[i] + noise[i]).bfloat16())
    return lengths


def settings_of(folder: Path) -> TrainSettings:
    """A small but complete run over the store of `random_store(folder / "store")`."""
    return TrainSettings(
        study="planted",
        pair="base_tuned",
        pairs={"base_tuned": ["base", "tuned"]},
        models={"base": ModelConfig(id="a"), "tuned": ModelConfig(id="b")},
        hookpoint=HOOKPOINT,
        hookpoints=[HOOKPOINT],
        outputs=str(folder),
        store=str(folder / "store"),
        crosscoder=CrosscoderConfig(
            num_latents=32, k=3, dead_after_tokens=192, threshold_start_step=5, threshold_decay=0.9, dedicated=0.125
        ),
        training=TrainingConfig(
            num_tokens=32 * 24,
            num_tokens_per_step=32,
            lr=1e-2,
            warmup_steps=4,
            decay_fraction=0.25,
            device="cpu",
            checkpoint_every=5,
            log_every=1,
            validate_every=7,
        ),
        data=DataConfig(heldout_fraction=0.2),
        tracking=TrackingConfig(mode="disabled"),
    )


def train_arguments(study: Path, num_tokens: int) -> list[str]:
    """A small run over the store of `random_store(study / "store")`, as a command line."""
    arguments = ["experiment=pair", "models.base=a", "models.tuned=b", f"hookpoint={HOOKPOINT}", f"outputs={study}"]
    arguments += ["crosscoder.num_latents=32", "crosscoder.k=3", "crosscoder.threshold_start_step=5"]
    arguments += ["crosscoder.dead_after_tokens=200", "data.heldout_fraction=0.2", "tracking.mode=disabled"]
    arguments += [f"training.num_tokens={num_tokens}", "training.num_tokens_per_step=32", "training.warmup_steps=4"]
    arguments += ["training.log_every=1", "training.validate_every=50", "training.checkpoint_every=20"]
    return ["-m", "train", *arguments, "training.device=cpu"]
