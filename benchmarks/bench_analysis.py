"""The analysis pass beside what it cannot do without, and beside the published form of latent scaling.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_analysis experiment=demo/base_simpo outputs=FOLDER

reads the store and the crosscoder of a finished study. Ratios are of processor time, which other work on the machine
hardly changes, of alternatives in turn:

1. `write_latents`, everything from the pass to the files on disk, for all latents, against one pass over the same store
   that only encodes (sparse, in chunks) and decodes; and against one that does both densely, `Crosscoder.encode` and
   `decode`.
2. The pass itself against latent scaling as published (arXiv 2504.02922): for each focus, target and model one pass
   over the store, eight for two models, each encoding and decoding densely, and one regression for every latent. Both
   over the same `SOME_BATCHES` batches; the largest difference between their nu is printed, and how many are too large
   to be compared.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice, product
from pathlib import Path

import torch
from torch import Tensor

from analysis.config import AnalysisSettings
from analysis.firings.reading import Reading, TokenBatch
from analysis.firings.token_kinds import read_kinds
from analysis.latents.one_pass import LatentPass, state_folder
from analysis.latents.scaling import decoder_gram, nu
from analysis.latents.state import PassState
from analysis.latents.step import control_tokens, owned_and_sampled, tokenizer_of, write_latents
from benchmarks.timing import machine
from extract.command import experiment_of, run
from train.crosscoder import Crosscoder
from train.data import ActivationPairs
from train.encoder import Operands
from train.inference import inference_codes
from train.runs import run_folder
from train.sparse import decode

REPEATS = 3
SOME_BATCHES = 8
# Of a |nu| from here on the denominator is close to 0, and its rounding large.
LARGE_NU = 10


def main(settings: AnalysisSettings) -> None:
    print(machine())
    folder = run_folder(settings, experiment_of(settings)) / "crosscoder"
    crosscoder, pairs = Crosscoder.load(folder), ActivationPairs.open(settings)
    config = settings.analysis
    kinds = read_kinds(pairs.tokens, control_tokens(tokenizer_of(settings, pairs.tokens)))
    reading = Reading(pairs, kinds, config.batch_tokens, config.intervals.groups)
    print(f"{reading.num_tokens} kept tokens, {pairs.num_documents} documents, L = {crosscoder.num_latents}")
    with tempfile.TemporaryDirectory() as outputs, torch.inference_mode():
        compare_with_coding(settings, folder, crosscoder, reading, Path(outputs))
        compare_with_eight_passes(settings, crosscoder, reading, Path(outputs))
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def compare_with_coding(
    settings: AnalysisSettings, folder: Path, crosscoder: Crosscoder, reading: Reading, outputs: Path
) -> None:
    """Prints what everything costs beside encoding and decoding."""
    write_latents(settings, folder, outputs)  # what is imported late, and caches beside the store
    seconds: dict[str, list[float]] = {"analysis": [], "sparse": [], "dense": []}
    for _ in range(REPEATS):
        shutil.rmtree(state_folder(outputs))  # a finished pass is not done again
        seconds["analysis"].append(cpu_seconds(lambda: write_latents(settings, folder, outputs)))
        seconds["sparse"].append(cpu_seconds(lambda: code(crosscoder, reading.batches(0))))
        seconds["dense"].append(cpu_seconds(lambda: code_densely(crosscoder, reading.batches(0))))
    print("CPU seconds: " + ", ".join(f"{name} {statistics.median(each):.1f}" for name, each in seconds.items()))
    for name in ("sparse", "dense"):
        ratios = [ours / theirs for ours, theirs in zip(seconds["analysis"], seconds[name], strict=True)]
        shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"analysis against one {name} encode + decode pass: {statistics.median(ratios):.2f} ({shown})")


def code(crosscoder: Crosscoder, batches: Iterable[TokenBatch]) -> None:
    """One encode + decode pass, without a (B, L) tensor."""
    operands = Operands.of(crosscoder)
    assert crosscoder.threshold is not None
    for batch in batches:
        x_BMD = crosscoder.scale(batch.x_BMD)
        selection, code_S = inference_codes(crosscoder.threshold, x_BMD.flatten(1), operands)
        decode(selection, code_S, len(x_BMD), operands)


def code_densely(crosscoder: Crosscoder, batches: Iterable[TokenBatch]) -> None:
    """One encode + decode pass by the crosscoder's own methods."""
    for batch in batches:
        crosscoder.decode(crosscoder.encode(batch.x_BMD))


def compare_with_eight_passes(
    settings: AnalysisSettings, crosscoder: Crosscoder, reading: Reading, outputs: Path
) -> None:
    """Prints what latent scaling costs beside its published form, and that both agree."""
    gram_LMM = decoder_gram(crosscoder.W_dec.unflatten(1, (crosscoder.num_models, crosscoder.d_model)))
    batches = list(islice(reading.batches(0), SOME_BATCHES))
    masks = owned_and_sampled(crosscoder, gram_LMM, settings.analysis)
    found: list[LatentPass] = []

    def pass_over() -> None:
        with tempfile.TemporaryDirectory(dir=outputs) as folder:
            state = PassState(Path(folder) / "pass", {})
            found.append(LatentPass(crosscoder, reading, settings.analysis, *masks, state))
            for batch in batches:
                found[-1].add(batch)

    nus: list[dict[tuple[str, int], Tensor]] = []
    slow, fast = (
        cpu_seconds(lambda: nus.append(eight_passes(crosscoder, batches))),
        cpu_seconds(pass_over),
    )
    ours = dict(zip(("error", "reconstruction"), nu(found[-1].sums.total(), gram_LMM), strict=True))
    worst, num_compared, num_large = 0.0, 0, 0
    for (target, focus), theirs_LM in nus[-1].items():
        both = torch.stack([ours[target][:, focus], theirs_LM.double()]).flatten(1)
        both = both[:, both.isfinite().all(0)]
        is_usual = both[1].abs() < LARGE_NU
        worst = max(worst, (both[0] - both[1])[is_usual].abs().max().item())
        num_compared, num_large = num_compared + is_usual.numel(), num_large + int((~is_usual).sum())
    print(f"eight passes {slow:.1f} s, ours {fast:.1f} s: {slow / fast:.1f} times")
    print(f"nu differs by {worst:.1e} at most, but for {num_large} of {num_compared} values of {LARGE_NU} and more")


def eight_passes(crosscoder: Crosscoder, batches: list[TokenBatch]) -> dict[tuple[str, int], Tensor]:
    """nu (L, M) by (target, focus), as published: beta of every focus, target and model from a pass of its own."""
    models = range(crosscoder.num_models)
    found = {}
    for target, focus in product(("error", "reconstruction"), models):
        beta_ML = torch.stack([beta(crosscoder, batches, target, focus, model) for model in models])
        found[target, focus] = (beta_ML / beta_ML[focus]).T
    return found


def beta(crosscoder: Crosscoder, batches: list[TokenBatch], target: str, focus: int, model: int) -> Tensor:
    """The least-squares factor (L,) of every latent of the focus model for one target of one model."""
    W_dec_MLD = crosscoder.W_dec.unflatten(1, (crosscoder.num_models, crosscoder.d_model)).transpose(0, 1)
    d_LD, own_LD = W_dec_MLD[focus], W_dec_MLD[model]
    dots_L = torch.zeros(crosscoder.num_latents, dtype=torch.float64)
    squares_L = torch.zeros_like(dots_L)
    for batch in batches:
        x_BMD = crosscoder.scale(batch.x_BMD)
        acts_BL = crosscoder.encode(batch.x_BMD)
        recons_BD = crosscoder.reconstruct(acts_BL)[:, model]
        target_BD = recons_BD if target == "reconstruction" else x_BMD[:, model] - recons_BD
        own_squares_L = acts_BL.square().sum(0, dtype=torch.float64)
        dots_L += (acts_BL * (target_BD @ d_LD.T)).sum(0, dtype=torch.float64)
        if target == "error":  # the latent's own part, which the error has lost, is added back
            dots_L += own_squares_L * (own_LD * d_LD).sum(1)
        squares_L += own_squares_L
    return dots_L / (squares_L * d_LD.square().sum(1))


def cpu_seconds(function: Callable[[], object]) -> float:
    """Processor time of all threads of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    run(AnalysisSettings, main)
