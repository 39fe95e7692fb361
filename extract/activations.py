"""Token shards -> activation shards of every model: `python -m extract.activations experiment=STUDY`.

Start it once, or any number of times, on any number of hosts that share the store: by hand, with torchrun, srun or an
array job. A shard belongs to the worker that claimed it, workers may come, die and go, and `python -m extract.status`
shows them all. Batches never span shards, so what a shard holds is a pure function of its documents, the model and the
token budget, whoever computes it; a rerun computes what is missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from extract.archive import is_finished, shard_path
from extract.background import Background
from extract.batches import ShardActivations, compute_shard
from extract.claims import Claim, Claims, in_turn
from extract.command import run
from extract.config import DTYPES, ExtractSettings
from extract.devices import choose_device
from extract.errors import BadInput
from extract.interrupts import stops_interrupt
from extract.made_with import check_folder, settings_sha256, start_folder
from extract.models import CutModel, check_context, check_model, load_blocks
from extract.progress import ProgressLog
from extract.remote import refuse_writing
from extract.restarts import note_shards
from extract.shards import finish_activations, write_activation_shard
from extract.stores import ActivationStore, TokenStore
from extract.weights import identity, weights_of

POLL_S = 1.0  # between looks at what other workers finished


def extract(settings: ExtractSettings) -> None:
    """Write the activations of every needed model at every hookpoint; what exists is kept.

    Everything that can be refused is refused before the first forward pass, and before the store is touched. Ends when
    every model is finished, whoever finished it; with `activations.wait=false`, when nothing is left to claim.
    """
    refuse_writing(settings.store)
    tokens = TokenStore(settings.tokens_folder)
    device = worker_device(settings.activations.device, os.environ)
    check_spread(settings, os.environ)
    _check_models(settings, int(tokens.lengths.max()))
    open_models = [ModelShards(settings, tokens, name) for name in settings.needed_models]
    with (
        Claims(settings.claims_folder, settings.activations.claim_timeout_s) as claims,
        ProgressLog(settings, tokens, claims) as progress,
    ):
        for model in open_models:
            model.start(claims)
        note_shards(settings.claims_folder, _all_folders(settings), settings.max_restarts_without_progress)
        while open_models:
            before, computed = open_models, 0
            open_models = []
            for model in before:
                config = settings.models[model.name]
                load = partial(load_blocks, model.name, config, model.hookpoints, device)
                computed += model.compute(claims, load, progress.note)
                if not model.finish(claims):
                    open_models.append(model)
            if open_models and not computed:
                if not settings.activations.wait:
                    break
                progress.note()
                time.sleep(POLL_S)
        if not open_models:
            progress.finished()
    for model in open_models:
        print(f"activations: {model.name} lacks {len(model.missing)} shards, which other workers are at")


def _check_models(settings: ExtractSettings, longest: int) -> None:
    """BadInput for a model that cannot be used, on documents of up to `longest` tokens, and for a pair whose models
    have different widths.
    """
    names = settings.needed_models
    widths = {name: check_model(name, settings.models[name], settings.hookpoints_of(name)) for name in names}
    for name in names:
        check_context(name, settings.models[name], longest)
    for pair, members in settings.needed_pairs.items():
        models = [settings.place(member).model for member in members]
        if len({widths[name] for name in models}) > 1:
            listed = ", ".join(f"{name} {widths[name]}" for name in models)
            raise BadInput(
                f"pairs.{pair}: its models have different widths ({listed}). A crosscoder compares models of one width."
            )


def _all_folders(settings: ExtractSettings) -> list[Path]:
    models = settings.needed_models
    return [settings.activations_folder(model, hook) for model in models for hook in settings.hookpoints_of(model)]


def worker_device(name: str, environment: Mapping[str, str]) -> torch.device:
    """The device of this process: with "auto" and several GPUs, the one of its number on this host."""
    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID")
    if name == "auto" and local and torch.cuda.device_count() > 1:
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return choose_device(name, "activations.device")


def check_spread(settings: ExtractSettings, environment: Mapping[str, str]) -> None:
    """BadInput when several processes of a node would each spread a model over all of its GPUs."""
    spread = [name for name in settings.needed_models if settings.models[name].device_map]
    variables = ["LOCAL_WORLD_SIZE"]
    if not environment.get("SLURM_GPUS_PER_TASK"):  # else every task sees GPUs of its own
        variables.append("SLURM_NTASKS_PER_NODE")
    for variable in variables:
        if spread and int(environment.get(variable) or 1) > 1:
            raise BadInput(
                f"models.{spread[0]}.device_map=auto spreads the model over all GPUs that a process sees, and "
                f"{variable}={environment[variable]} processes share those of this node. Start one process a node, or "
                f"leave device_map out."
            )


def decisive_settings(
    settings: ExtractSettings, tokens: TokenStore, name: str, hookpoint: str, hashes: Path
) -> dict[str, Any]:
    """What decides the bytes of a model's shards at a hookpoint; the folder `hashes` remembers those of weights."""
    config = settings.models[name]
    return {
        "model": identity(name, config, weights_of(name, config, hashes)),
        "hookpoint": hookpoint,
        "skip_first_tokens": settings.kept.skip_first_tokens,
        "batch_tokens": settings.activations.batch_tokens,
        "codec": settings.activations.codec or DTYPES[config.dtype],
        "tokens_sha256": tokens.manifest.content_sha256(),
    }


class ModelShards:
    """The shards of one model at all hookpoints; `missing` are those that this worker has not seen finished."""

    def __init__(self, settings: ExtractSettings, tokens: TokenStore, name: str):
        self.settings = settings
        self.tokens = tokens
        self.name, self.hookpoints = name, settings.hookpoints_of(name)
        self.documents = tokens.shard_documents()
        self.missing = list(range(len(self.documents)))
        self._finished: set[int] = set()
        self._made_with: dict[str, dict] = {}  # by hookpoint

    def start(self, claims: Claims) -> None:
        """Begin or continue the folders; BadInput when they hold shards of other settings, or others make such."""
        settings, hashes = self.settings, Path(self.settings.store)
        self._made_with = {
            hookpoint: decisive_settings(settings, self.tokens, self.name, hookpoint, hashes)
            for hookpoint in self.hookpoints
        }
        for hookpoint, folder in self._folders().items():
            start_folder(folder, self._made_with[hookpoint], claims.others_at_work(self.name))

    def compute(self, claims: Claims, load: Callable[[], CutModel], note: Callable[[], None]) -> int:
        """Compute every missing shard that no other worker holds, if there is one with the model that `load` gives;
        returns how many tokens that were. `note` is called between shards.
        """
        for hookpoint, folder in self._folders().items():
            check_folder(folder, self._made_with[hookpoint])  # a worker that began when we did may have replaced it
        self.missing = [number for number in self.missing if not self._is_finished(number)]
        model, began, computed, documents = None, time.monotonic(), 0, 0
        with self._bar() as bar, Background() as writing:
            for number in in_turn(self.missing, os.environ):
                claim = self._claim(claims, number)
                if claim is None:
                    continue
                model = model or load()
                shard = self._forward(model, number, bar)
                writing.submit(partial(self._write, claims, claim, number, shard))
                computed += shard.computed_tokens
                documents += sum(shard.lengths)
                note()
        if documents:
            seconds = time.monotonic() - began
            print(
                f"activations: {self.name}, this worker computed {documents:,} tokens in {seconds:.0f} s "
                f"({documents / seconds:,.0f} tokens/s), {1 - documents / computed:.1%} of what it computed was padding"
            )
        return documents

    def finish(self, claims: Claims) -> bool:
        """Write the manifests once every shard is there, whoever wrote it; returns whether they are."""
        self.missing = [number for number in self.missing if not self._is_finished(number)]
        folders = self._folders()
        if self.missing:
            return False
        if any(not (folder / "manifest.json").exists() for folder in folders.values()):
            claim = claims.take(f"{self.name}/manifest")
            if claim is None:
                return False
            self._write_manifests()
            claims.release(claim)
        claims.clear(self.name)
        for hookpoint, folder in folders.items():
            statistics = ActivationStore(folder).statistics
            print(
                f"activations: {self.name} at {hookpoint}, mean norm {statistics.mean_norm:.1f} over "
                f"{statistics.count:,} tokens, in {folder}"
            )
        return True

    def _write_manifests(self) -> None:
        for hookpoint, folder in self._folders().items():
            if not (folder / "manifest.json").exists():
                finish_activations(folder, self.tokens, self._made_with[hookpoint], asdict(self.settings))

    def _claim(self, claims: Claims, number: int) -> Claim | None:
        """The claim on a shard that is still missing; what a dead worker left of it is removed."""
        if self._is_finished(number):
            return None
        claim = claims.take(f"{self.name}/{shard_path(Path(), number).stem}")
        if claim is None:
            return None
        if self._is_finished(number):  # between the two lines above
            claims.release(claim)
            return None
        if claim.taken_over:
            for folder in self._folders().values():
                for partial in folder.glob(f"{shard_path(folder, number).stem}.*.partial"):
                    partial.unlink(missing_ok=True)
        return claim

    def _forward(self, model: CutModel, number: int, bar: tqdm) -> ShardActivations:
        documents = [self.tokens.document(i).token_ids for i in self.documents[number]]
        return compute_shard(model, documents, self.settings.activations.batch_tokens, bar.update)

    def _write(self, claims: Claims, claim: Claim, number: int, shard: ShardActivations) -> None:
        """Publish a shard at every hookpoint and release its claim; in the background, beside the next shard."""
        shard.wait()
        numbers = self.documents[number]
        for hookpoint, folder in self._folders().items():
            if claim.is_held() and not self._is_finished_at(hookpoint, number):
                rows = zip((self.tokens.keys[i] for i in numbers), shard.documents(hookpoint), strict=True)
                try:
                    write_activation_shard(folder, number, self.tokens, numbers, rows, self._made_with[hookpoint])
                except FileNotFoundError:  # whoever took a lost claim over removed what was being written here
                    if claim.is_held():
                        raise
        claims.release(claim)

    def _folders(self) -> dict[str, Path]:
        return {hookpoint: self.settings.activations_folder(self.name, hookpoint) for hookpoint in self.hookpoints}

    def _is_finished(self, number: int) -> bool:
        """Whether a shard is there at every hookpoint; one that is stays so and is not looked at again."""
        if number not in self._finished and all(self._is_finished_at(h, number) for h in self.hookpoints):
            self._finished.add(number)
        return number in self._finished

    def _is_finished_at(self, hookpoint: str, number: int) -> bool:
        folder = self.settings.activations_folder(self.name, hookpoint)
        return is_finished(shard_path(folder, number), settings_sha256(self._made_with[hookpoint]))

    def _bar(self) -> tqdm:
        """Of the tokens of this model: what is finished at the start, then what this worker computes."""
        missing = sum(int(self.tokens.lengths[list(self.documents[number])].sum()) for number in self.missing)
        return tqdm(
            total=self.tokens.num_tokens,
            initial=self.tokens.num_tokens - missing,
            unit="tok",
            unit_scale=True,
            desc=f"activations of {self.name}",
            disable=not missing,
        )


def main(settings: ExtractSettings) -> None:
    with stops_interrupt():
        extract(settings)


if __name__ == "__main__":
    run(ExtractSettings, main)
