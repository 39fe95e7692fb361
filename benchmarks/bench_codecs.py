"""What each codec costs a trained crosscoder: held-out variance explained when its input is stored in that codec.

python -m benchmarks.bench_codecs experiment=demo/base_simpo [key=value ...] [retrain=true]

The command line is that of `python -m train`, and finds the store and the run that it made; without one, the demo's.
Held-out activations are encoded and decoded, the crosscoder reads them, and its reconstruction is compared with the
activations as they are stored; every figure is a difference to reading those. With retrain=true the pair is also
trained from stores written in each codec, under OUTPUTS/codecs, and evaluated on the same original activations.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import machine
from extract.codecs import CODECS, Codec, decode, encode
from extract.command import compose, experiment_of
from extract.errors import BadInput
from extract.shards import write_activations
from train.config import TrainSettings
from train.crosscoder import Crosscoder
from train.data import ActivationPairs, heldout_batches
from train.metrics import VarianceExplained
from train.runs import run_folder
from train.trainer import train

BATCH_TOKENS = 2048
COMPARED = ("bf16", "fp16", "fp8", "int8")


def main(arguments: list[str]) -> None:
    overrides = [argument for argument in arguments if argument != "retrain=true"]
    settings = compose(TrainSettings, overrides)
    pairs = ActivationPairs.open(settings)
    crosscoder = Crosscoder.load(run_folder(settings, experiment_of(settings)) / "crosscoder")
    baseline = variance_explained(crosscoder, pairs, None)
    stored = " and ".join(f"{store.manifest.dtype}" for store in pairs.stores)
    print(f"{machine()}\n{settings.study}/{settings.pair}, {len(pairs.heldout_rows(None))} held-out tokens")
    print(f"variance explained of {' / '.join(pairs.models)}, stored as {stored}: {_figures(baseline, '.4f')}\n")
    print(f"{'codec':8} {'bytes a token':>14} {'error of activations':>26}   variance explained, difference")
    for name in COMPARED:
        show(name, pairs, variance_explained(crosscoder, pairs, CODECS[name]), baseline)
    if "retrain=true" in arguments:
        print("\ntrained on activations in the codec, evaluated on those stored")
        for name in COMPARED:
            show(name, pairs, variance_explained(retrained(settings, overrides, pairs, name), pairs, None), baseline)


def variance_explained(crosscoder: Crosscoder, pairs: ActivationPairs, codec: Codec | None) -> list[float]:
    """Of the stored held-out activations, per model, by reconstructions from their encoded and decoded form.

    The scaling of a model is a shift and one factor, so the figure is that of the scaled space of training.
    """
    explained = VarianceExplained(pairs.num_models, pairs.d_model, torch.device("cpu"))
    for x_BMD, seen_BMD in coded_batches(pairs, codec):
        with torch.inference_mode():
            explained.add(x_BMD, crosscoder.decode(crosscoder.encode(seen_BMD)))
    return explained.values()


def relative_errors(pairs: ActivationPairs, codec: Codec) -> list[float]:
    """Per model sum_t ||x_t - x^_t||^2 / sum_t ||x_t - mean||^2: the variance that the codec itself loses."""
    explained = VarianceExplained(pairs.num_models, pairs.d_model, torch.device("cpu"))
    for x_BMD, seen_BMD in coded_batches(pairs, codec):
        explained.add(x_BMD, seen_BMD)
    return [1 - value for value in explained.values()]


def coded_batches(pairs: ActivationPairs, codec: Codec | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out activations (B, M, D) as stored, and after encoding and decoding, both float32."""
    for raw_BMD, _ in heldout_batches(pairs, BATCH_TOKENS, None):
        x_BMD = raw_BMD.float()
        by_model = [x_BMD[:, m].contiguous() for m in range(pairs.num_models)]
        coded = [x_BD if codec is None else decode(encode(codec, x_BD)).float() for x_BD in by_model]
        yield x_BMD, torch.stack(coded, dim=1)


def retrained(settings: TrainSettings, overrides: list[str], pairs: ActivationPairs, name: str) -> Crosscoder:
    """The same run on a store written in codec `name`."""
    outputs = Path(settings.outputs) / "codecs" / name
    store = outputs / "store"
    shutil.rmtree(outputs, ignore_errors=True)
    shutil.copytree(pairs.tokens.folder, store / "tokens")
    for model, source in zip(pairs.models, pairs.stores, strict=True):
        documents = ((key, source.document(i)) for i, key in enumerate(source.keys))
        skip = source.manifest.settings["skip_first_tokens"]
        write_activations(store, model, settings.hookpoint, documents, skip, name)
    again = compose(TrainSettings, [*overrides, f"outputs={outputs}", "tracking.mode=disabled"])
    return Crosscoder.load(train(again, run_folder(again, experiment_of(again))))


def show(name: str, pairs: ActivationPairs, values: list[float], baseline: list[float]) -> None:
    codec = CODECS[name]
    size = pairs.d_model * codec.dtype.itemsize + (4 if codec.largest else 0)
    differences = [value - reference for value, reference in zip(values, baseline, strict=True)]
    print(
        f"{name:8} {size:14} {_figures(relative_errors(pairs, codec), '.2e'):>26}   "
        f"{_figures(differences, '+.6f')}   ({_figures(values, '.4f')})"
    )


def _figures(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or ["experiment=demo/base_simpo"])
    except BadInput as error:
        print(f"not measured: {error}")  # `make bench` goes on where the demo has not been run
        sys.exit(len(sys.argv) > 1)
