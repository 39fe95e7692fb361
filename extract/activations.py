"""Token shards -> activation shards of every model: `python -m extract.activations experiment=STUDY`.

Batches are packed by length inside a shard, so what a shard holds is a pure function of its documents, the model and
the token budget. Work goes shard by shard; a shard is published when it is whole, and a rerun computes what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extract.archive import finished_shard, shard_path, start_folder
from extract.command import run
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.models import CutModel, adapter_folder, check_model, load_blocks
from extract.shards import finish_activations, write_activation_shard
from extract.stores import ActivationStore, TokenStore


def extract(settings: ExtractSettings) -> None:
    """Write the activations of every needed model at every hookpoint; what exists is kept.

    Everything that can be refused is refused before the first forward pass, and before the store is touched.
    """
    tokens = TokenStore(settings.tokens_folder)
    resolve_device(settings.activations.device)
    _check_models(settings)
    for name in settings.needed_models:
        for hookpoint in settings.hookpoints:
            start_folder(settings.activations_folder(name, hookpoint), _made_with(settings, tokens, name, hookpoint))
    for name in settings.needed_models:
        _extract_model(settings, tokens, name)


def _check_models(settings: ExtractSettings) -> None:
    """BadInput for a model that cannot be used, and for a pair whose models have different widths."""
    widths = {name: check_model(name, settings.models[name], settings.hookpoints) for name in settings.needed_models}
    for pair, members in settings.needed_pairs.items():
        if len({widths[name] for name in members}) > 1:
            listed = ", ".join(f"{name} {widths[name]}" for name in members)
            raise BadInput(
                f"pairs.{pair}: its models have different widths ({listed}). A crosscoder compares models of one width."
            )


def _extract_model(settings: ExtractSettings, tokens: TokenStore, name: str) -> None:
    folders = {hookpoint: settings.activations_folder(name, hookpoint) for hookpoint in settings.hookpoints}
    shards = list(enumerate(tokens.shard_documents()))
    missing = [
        (number, numbers)
        for number, numbers in shards
        if any(finished_shard(shard_path(folder, number)) is None for folder in folders.values())
    ]
    with tqdm(total=tokens.num_tokens, unit="tok", unit_scale=True, desc=f"activations of {name}") as bar:
        bar.update(tokens.num_tokens - sum(int(tokens.lengths[list(numbers)].sum()) for _, numbers in missing))
        if missing:
            device = resolve_device(settings.activations.device)
            model = load_blocks(name, settings.models[name], settings.hookpoints, device)
            for number, numbers in missing:
                _extract_shard(settings, model, tokens, name, number, numbers, bar)
    for hookpoint, folder in folders.items():
        if not (folder / "manifest.json").exists():
            finish_activations(folder, tokens, _made_with(settings, tokens, name, hookpoint), asdict(settings))
        statistics = ActivationStore(folder).statistics
        print(
            f"activations: {name} at {hookpoint}, mean norm {statistics.mean_norm:.1f} over {statistics.count:,} "
            f"tokens, in {folder}"
        )


def _extract_shard(
    settings: ExtractSettings, model: CutModel, tokens: TokenStore, name: str, number: int, numbers: range, bar: tqdm
) -> None:
    computed: dict[str, dict[int, Tensor]] = {hookpoint: {} for hookpoint in settings.hookpoints}
    for batch in length_batches(tokens.lengths[list(numbers)], settings.activations.batch_tokens):
        documents = [numbers[i] for i in batch]
        for hookpoint, rows in forward(model, [tokens.document(i).token_ids for i in documents]).items():
            computed[hookpoint].update(zip(documents, rows, strict=True))
        bar.update(int(tokens.lengths[documents].sum()))
    for hookpoint, by_document in computed.items():
        folder = settings.activations_folder(name, hookpoint)
        ordered = ((tokens.keys[i], by_document[i]) for i in numbers)
        if finished_shard(shard_path(folder, number)) is None:
            write_activation_shard(folder, number, tokens, numbers, ordered, settings.kept.skip_first_tokens)


def forward(model: CutModel, documents: list[np.ndarray]) -> dict[str, list[Tensor]]:
    """Activations (N_i, D) of each document at each hookpoint, on the CPU; documents are padded at the right to the
    longest.
    """
    lengths = [len(token_ids) for token_ids in documents]
    token_ids_BN = torch.zeros(len(documents), max(lengths), dtype=torch.long)
    mask_BN = torch.zeros_like(token_ids_BN)
    for row, token_ids in enumerate(documents):
        token_ids_BN[row, : lengths[row]] = torch.from_numpy(token_ids.astype(np.int64))
        mask_BN[row, : lengths[row]] = 1
    caught = model.activations(token_ids_BN, mask_BN)
    return {
        hookpoint: [acts_ND[:length].clone() for acts_ND, length in zip(acts_BND.cpu(), lengths, strict=True)]
        for hookpoint, acts_BND in caught.items()
    }


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Documents packed longest first, as many as fit `batch_tokens` with padding; a longer document comes alone.

    Documents of similar length share a batch, so little of it is padding. A pure function of its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, int(batch_tokens // lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def resolve_device(device: str) -> str:
    """ "auto" is a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"activations.device={device}, but torch finds no GPU. Set it to auto or cpu.")
    return device


def _made_with(settings: ExtractSettings, tokens: TokenStore, name: str, hookpoint: str) -> dict:
    """What decides the bytes of the shards."""
    config = settings.models[name]
    adapter = adapter_folder(name, config)
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest() if adapter else None
    return {
        "model": {"name": name, **asdict(config), "adapter_sha256": weights},
        "hookpoint": hookpoint,
        "skip_first_tokens": settings.kept.skip_first_tokens,
        "batch_tokens": settings.activations.batch_tokens,
        "tokens_sha256": tokens.manifest.content_sha256(),
    }


if __name__ == "__main__":
    run(ExtractSettings, extract)
