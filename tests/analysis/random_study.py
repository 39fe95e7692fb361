"""A store of random activations over chats and plain texts, and a random crosscoder with dedicated latents.

As a script: the analysis of that study in a process of its own, `python random_study.py FOLDER OUTPUT SECONDS`, which
waits so long after every batch, for those who kill it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.config import AnalysisSettings
from analysis.firings.reading import TokenBatch
from analysis.latents.one_pass import LatentPass
from analysis.latents.step import write_latents
from extract.config import ModelConfig
from extract.shards import write_activations, write_tokens
from extract.stores import TokenDocument
from tests import tiny
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.data import ActivationPairs

D, NUM_LATENTS, NUM_DOCUMENTS, MODELS = 8, 24, 70, ["base", "tuned"]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def make_study(root: Path, num_documents: int = NUM_DOCUMENTS) -> AnalysisSettings:
    """The store and `crosscoder` in `root`. Every seventh document repeats the text of the first, every third is plain
    text.
    """
    tiny.tokenizer().save_pretrained(root / "tokenizer")
    write_tokens(root / "store", [document(i) for i in range(num_documents)])
    generator = torch.Generator().manual_seed(0)
    shared = [torch.randn(length_of(i), D, generator=generator) for i in range(num_documents)]
    for model in MODELS:
        noisy = ((f"{i:09d}", x + 0.7 * torch.randn(x.shape, generator=generator)) for i, x in enumerate(shared))
        write_activations(root / "store", model, "block1", noisy)
    random_crosscoder().save(root / "crosscoder")
    return settings_of(root)


def length_of(number: int) -> int:
    """Tokens of a document."""
    return 3 + number * 5 % 9


def document(number: int) -> TokenDocument:
    """Plain text, or a chat whose template is the first token, the one between the roles and the last."""
    length = length_of(number)
    text = "the same" if number % 7 == 0 else f"text {number}"
    ids = np.arange(10, 10 + length, dtype=np.uint32)
    if number % 3 == 0:
        return TokenDocument("", f"d{number}", "prose", ids, text)
    half = length // 2
    roles = [("user", 1, half), ("assistant", half + 1, length - 1)]
    messages = [{"role": "user", "content": text}]
    return TokenDocument("", f"d{number}", "chat", ids, messages=messages, roles=roles)


def random_crosscoder() -> Crosscoder:
    """A quarter of the latents is dedicated to each model; the last never fires, the one before on most tokens."""
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=NUM_LATENTS, k=4, dedicated=0.25), MODELS, D, "block1")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (crosscoder.W_enc, crosscoder.W_dec, crosscoder.b_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)
        crosscoder.zero_foreign_rows(crosscoder.W_enc, crosscoder.W_dec)
        crosscoder.b_enc.fill_(-0.3)
        crosscoder.b_enc[-2:] = torch.tensor([3.0, -99.0])
    crosscoder.threshold = 1.5
    return crosscoder


def settings_of_store(root: Path, models: list[str]) -> AnalysisSettings:
    """Settings for the store and tokenizer in `root`, of a crosscoder of these models."""
    settings = AnalysisSettings(
        study="tests",
        outputs=str(root),
        store=str(root / "store"),
        hookpoint="block1",
        models={model: ModelConfig(id=str(root / "tokenizer")) for model in models},
        pairs={"base_tuned": models},
    )
    settings.crosscoder.activation_scaling = "none"
    settings.training.num_tokens_per_step, settings.data.heldout_fraction = 8, 0.0
    return settings


def settings_of(root: Path) -> AnalysisSettings:
    settings = settings_of_store(root, MODELS)
    analysis = settings.analysis
    analysis.device, analysis.batch_tokens = "cpu", 12
    analysis.examples.top_documents = analysis.annotate.num_documents = 4
    analysis.examples.num_quantiles, analysis.examples.samples_per_quantile = 3, 2
    analysis.examples.num_silent, analysis.examples.num_near_miss = 5, 3
    analysis.intervals.groups, analysis.intervals.resamples = 10, 50
    return settings


def dense_codes(settings: AnalysisSettings) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every document (positions of kept tokens (n,), codes (n, L), pre-activations (n, L)), by the plain maths."""
    pairs, crosscoder = ActivationPairs.open(settings), random_crosscoder()
    found = []
    for number in range(pairs.num_documents):
        x_NMD, kept_N = pairs.document(number)
        with torch.no_grad():
            acts_nL = crosscoder.encode(x_NMD[kept_N])
            pre_nL = crosscoder.pre_activations(crosscoder.scale(x_NMD[kept_N]))
        found.append((kept_N.nonzero().squeeze(1).numpy(), acts_nL.numpy(), pre_nL.numpy()))
    return found


def run_slowly(root: Path, output: Path, seconds: float) -> None:
    """The analysis with a state after every batch."""
    torch.set_num_threads(1)
    add = LatentPass.add

    def slow_add(self: LatentPass, batch: TokenBatch) -> None:
        add(self, batch)
        time.sleep(seconds)

    LatentPass.add = slow_add  # type: ignore[method-assign]
    settings = settings_of(root)
    settings.analysis.save_minutes = 1e-9
    write_latents(settings, root / "crosscoder", output)


if __name__ == "__main__":
    run_slowly(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
