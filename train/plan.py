"""python -m train.plan experiment=STUDY/PAIR gpus=8 gpu=h100 read_gbps=5: what a run needs and takes, before it starts.

For every engine: memory per GPU, what a step consists of and what bounds it, hours; the disk; which engine to choose,
and warnings. Needs neither a model nor a store nor a GPU: the width comes from the store where there is one, else from
models.NAME.d_model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from extract.codecs import CODECS
    from extract.command import run
    from extract.config import DTYPES, Place
    from extract.errors import BadInput
    from extract.manifest import Manifest
    from extract.remote import is_url
    from train.checks import multiple
    from train.config import TrainSettings
    from train.division import check_ranks
    from train.gpus import gpu_named
    from train.job import FLOAT, Job, Layout, layouts
    from train.plan_options import Plan, StoreFacts, plan_options
    from train.plan_table import report
    from train.runs import selected_pair
    from train.step_time import Machine


@dataclass
class PlanSettings(TrainSettings):
    """The settings of training, and the machine to plan for."""

    # Number of GPUs.
    gpus: int = 1
    # Their name: h100, h200, a100, ... (train/gpus.py); any other with numbers of your own below.
    gpu: str = "h100"
    # GB/s at which all ranks together read the store.
    read_gbps: float = 2.0
    # GPUs of one node; more GPUs than these are several nodes.
    gpus_per_node: int = 8
    # GB/s that a GPU sends to another node.
    network_gbps: float = 50.0
    # Memory of the GPU in GiB; null, here and below = as on its data sheet.
    gpu_memory_gib: float | None = None
    # TFLOP/s of dense products in training.precision.
    gpu_tflops: float | None = None
    # GB/s between memory and processor.
    gpu_memory_gbps: float | None = None
    # GB/s that a GPU sends to another of its node.
    gpu_link_gbps: float | None = None
    # Share of these peak rates that a step attains.
    efficiency: float = 0.6
    # Share of the latents that AuxK is planned for: those dead at one time.
    dead_share: float = 0.1

    def check(self) -> None:
        super().check()
        for name in ("gpus", "read_gbps", "gpus_per_node", "network_gbps"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name}={getattr(self, name)} must be greater than 0.")
        if not 0 < self.efficiency <= 1:
            raise BadInput(f"efficiency={self.efficiency} is a share of the peak rates: above 0, at most 1.")
        if not 0 <= self.dead_share < 1:
            raise BadInput(f"dead_share={self.dead_share} must be at least 0 and less than 1.")
        if self.gpus > self.gpus_per_node:
            multiple("gpus", self.gpus, self.gpus_per_node, "gpus_per_node")
        check_ranks(self, self.gpus)
        if self.engine.ranks_per_copy is not None:
            multiple("gpus", self.gpus, self.engine.ranks_per_copy, "engine.ranks_per_copy")


def main(settings: PlanSettings) -> None:
    print(report(make_plan(settings)))


def make_plan(settings: PlanSettings) -> Plan:
    """The plan of a run; BadInput for a GPU or a width that is not known."""
    own = settings.gpu_memory_gib, settings.gpu_tflops, settings.gpu_memory_gbps, settings.gpu_link_gbps
    store = store_facts(settings)
    machine = Machine(
        gpu_named(settings.gpu, *own),
        settings.gpus,
        settings.gpus_per_node,
        settings.efficiency,
        settings.network_gbps,
        math.inf if store.online else settings.read_gbps,
    )
    job = _job(settings, store)
    options = plan_options(job, machine, _layouts(settings))
    training = settings.training
    title = f"{settings.study}/{selected_pair(settings)}"
    keep, has_recovered = training.keep_checkpoints, training.recovered_tokens > 0
    return Plan(title, job, machine, store, options, training.num_steps, keep, has_recovered)


def _layouts(settings: PlanSettings) -> list[Layout]:
    """With copies as the settings say, else one a node where there are several."""
    node = settings.gpus_per_node if settings.gpus > settings.gpus_per_node else None
    return layouts(settings.gpus, settings.engine.ranks_per_copy or node, settings.engine.offload_optimizer)


def _job(settings: PlanSettings, store: StoreFacts) -> Job:
    crosscoder, training = settings.crosscoder, settings.training
    dead_share = settings.dead_share if crosscoder.auxk_alpha > 0 else 0
    return Job(
        num_tokens=training.num_tokens_per_step,
        num_models=len(settings.pairs[selected_pair(settings)]),
        d_model=store.d_model,
        num_latents=crosscoder.num_latents,
        k=crosscoder.k,
        num_dead=math.ceil(dead_share * crosscoder.num_latents),
        has_delta=crosscoder.delta_weight > 0,
        num_micro_steps=training.num_micro_steps,
        step=training.step,
        precision=training.precision,
        stored_token_bytes=store.token_bytes,
    )


def store_facts(settings: TrainSettings) -> StoreFacts:
    """What the run reads: from the manifests where extraction is complete, else as the settings will make it."""
    models = settings.pairs[selected_pair(settings)]
    places = [settings.place(model) for model in models]
    manifests = [_manifest(settings, place) for place in places]
    found = [manifest for manifest in manifests if manifest is not None]
    widths = [_width(settings, place, manifest) for place, manifest in zip(places, manifests, strict=True)]
    if len(set(widths)) > 1:
        listed = dict(zip(models, widths, strict=True))
        raise BadInput(f"The models differ in width ({listed}). A crosscoder needs one width: choose another pair.")
    d_model = widths[0]
    codecs = [_codec(settings, place, manifest) for place, manifest in zip(places, manifests, strict=True)]
    token_bytes = sum(_token_bytes(codec, d_model) for codec in codecs)
    complete = len(found) == len(models)
    num_tokens = found[0].tokens if complete else settings.corpus.num_tokens
    disk = sum(entry.bytes for manifest in found for entry in manifest.shards) if complete else None
    online = settings.data.mode == "online"
    return StoreFacts(d_model, "+".join(dict.fromkeys(codecs)), token_bytes, num_tokens, disk, online)


def _manifest(settings: TrainSettings, place: Place) -> Manifest | None:
    """Of a finished store on this machine; a remote one is not asked: a plan needs no network."""
    if is_url(settings.store):
        return None
    folder = settings.activations_folder(place.model, place.hookpoint)
    return Manifest.read(folder) if (folder / "manifest.json").exists() else None


def _width(settings: TrainSettings, place: Place, manifest: Manifest | None) -> int:
    model = place.model
    width = manifest.d_model if manifest else settings.models[model].d_model
    if width is None:
        raise BadInput(
            f"The width of model {model} is not known: {settings.store} holds none of its activations at "
            f"hookpoint={place.hookpoint}. Say it: models.{model}.d_model=NUMBER (hidden_size in its config.json)."
        )
    return width


def _codec(settings: TrainSettings, place: Place, manifest: Manifest | None) -> str:
    if manifest is None:
        return settings.activations.codec or DTYPES[settings.models[place.model].dtype]
    return DTYPES.get(str(manifest.dtype), str(manifest.dtype))  # stores of format 1 spell bf16 "bfloat16"


def _token_bytes(codec: str, d_model: int) -> int:
    """Bytes of a token of one model: its values and, for a scaled codec, a scale."""
    return d_model * CODECS[codec].dtype.itemsize + (FLOAT if CODECS[codec].largest else 0)


if __name__ == "__main__":
    run(PlanSettings, main)
