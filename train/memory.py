"""Memory of a training step on one rank, component by component, at the moment when most is alive.

State is alive throughout; besides it a step passes through moments, and the peak is the state and the largest of them:

    state       float32 weights and gradients, Adam's two moments, what products read (bf16 copies)
    encode      scaled batch, a chunk of codes, candidates of the selection; AuxK's codes
    loss        reconstructions, errors and their gradients; AuxK's twice as many
    gradients   what the backward pass adds: codes sorted by latent, AuxK's products
    readable    the whole (tokens, latents) matrix several times over, through forward and backward
    reduce      summed gradients beside those of this rank

What is divided among R ranks, of N parameters of 4 bytes; all else is whole on each:

    fsdp        weights, moments          a step: weights gathered, in the precision of products; reduce: N / R
    ZeRO-1, 2   moments                   reduce: N / R
    ZeRO-3      weights, moments          a step: weights gathered, one by one; reduce: N / R
    latent      all                       a step: the tokens of all R ranks

The numbers of buffers were read off traces, and tests compare the sum with the profiler's peaks for every engine.

Shapes on a rank: b tokens, l latents, S codes, Z dead latents, W = M * D, N parameters. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.candidates import SAMPLE_SIZE
from train.encoder import chunk_latents
from train.job import FLOAT, Job, Layout
from train.loader import RING
from train.zero_config import BUCKET_ELEMENTS

# Bytes of an index or a count, and of a selected code with its score and where it is: token, latent, code, score.
INDEX = 8
CODE = 2 * INDEX + 2 * FLOAT
# Bytes of an entry while candidates are compared: on a CPU of those above a bound; on a GPU there is a place for every
# entry of a chunk (of four times as many bytes where the kernels do not run), and three for each that is kept. Ranks
# together cut by histograms, which takes a CPU more.
CANDIDATE, CANDIDATE_OF_RANKS = {"cpu": 48, "cuda": 16}, 64
# What DeepSpeed collects small gradients in.
BUCKET = FLOAT * BUCKET_ELEMENTS
# Names of the components, as a plan shows them.
WEIGHTS, GRADIENTS, MOMENTS = "weights", "gradients", "Adam's moments"
OPERANDS, COUNTERS = "weights as multiplied", "counters and norms"
BATCH, CODES, SELECTION, AUXK = "batch, errors, gradients", "codes before selection", "selection", "AuxK"
COMPONENTS = (WEIGHTS, GRADIENTS, MOMENTS, OPERANDS, COUNTERS, BATCH, CODES, SELECTION, AUXK)

Components = dict[str, float]


@dataclass(frozen=True)
class Part:
    """The sizes of one rank's part of a job, in one micro-batch."""

    # Tokens that are encoded here, and those that this rank read.
    tokens: float
    own_tokens: float
    latents: float
    codes: float
    dead: float
    width: int

    @classmethod
    def of(cls, job: Job, layout: Layout) -> Part:
        return cls(
            job.num_tokens / layout.token_ranks / job.num_micro_steps,
            job.num_tokens / layout.num_ranks / job.num_micro_steps,
            job.num_latents / layout.latent_ranks,
            job.num_selected / layout.num_ranks / job.num_micro_steps,
            job.num_dead / layout.latent_ranks,
            job.width,
        )

    @property
    def batch(self) -> float:
        """A float32 (tokens, W) buffer."""
        return FLOAT * self.tokens * self.width

    @property
    def own(self) -> float:
        """A float32 buffer of the tokens that this rank read."""
        return FLOAT * self.own_tokens * self.width

    @property
    def matrix(self) -> float:
        """A float32 (tokens, latents) matrix."""
        return FLOAT * self.tokens * self.latents

    @property
    def dead_matrix(self) -> float:
        """A float32 (tokens, dead latents) matrix."""
        return FLOAT * self.tokens * self.dead

    @property
    def dead_rows(self) -> float:
        """Float32 rows of a weight for the dead latents."""
        return FLOAT * self.dead * self.width


def peak_memory(job: Job, layout: Layout, device: str = "cuda") -> Components:
    """What is alive on a rank at the step's largest moment, by name; `device` is cuda or cpu."""
    part, state = Part.of(job, layout), state_memory(job, layout, device)
    gathered = add(state, {OPERANDS: _gathered(job, layout, device)})
    is_readable = job.step == "readable"
    moments = _readable_moments(job, layout, part) if is_readable else _sparse_moments(job, layout, part, device)
    peaks = [add(gathered, moment) for moment in moments]
    peaks += [add(state, _gather_moment(job, layout, device)), add(state, _reduce_moment(job, layout, device))]
    stored = job.stored_token_bytes * stored_tokens(job, layout)
    return largest([add(peak, {BATCH: stored}) for peak in peaks])


def stored_tokens(job: Job, layout: Layout) -> float:
    """Tokens as they were read: those of this step and those read ahead, and in `latent` those of the other ranks."""
    gathered = job.num_tokens / layout.token_ranks if layout.latent_ranks > 1 else 0
    return RING * job.num_tokens / layout.num_ranks + gathered


def state_memory(job: Job, layout: Layout, device: str = "cuda") -> Components:
    """What lasts from step to step."""
    whole = FLOAT * job.num_parameters
    part = whole / layout.update_ranks
    weights, gradients, on_device = part, whole / layout.latent_ranks, 0 if layout.offload_optimizer else 1
    if layout.engine == "deepspeed":
        weights = part if layout.zero_stage == 3 else whole
        offloading = FLOAT * job.num_weights if layout.offload_optimizer else 0  # what a gradient passes through
        gradients = (whole if job.step == "sparse" else 0) + (BUCKET if layout.zero_stage == 3 else offloading)
    latents = job.num_latents / layout.latent_ranks
    return {
        WEIGHTS: weights,
        GRADIENTS: gradients,
        MOMENTS: on_device * 2 * part,
        OPERANDS: 0 if layout.engine in ("fsdp", "deepspeed") else _copies(job, device) / layout.latent_ranks,
        COUNTERS: latents * (3 * INDEX + FLOAT * (2 * job.num_models + 2)),
    }


def _gathered(job: Job, layout: Layout, device: str) -> float:
    """What is there only while a step reads the weights."""
    whole = FLOAT * job.num_parameters
    if layout.engine == "fsdp":
        if job.precision == "fp32" or job.step == "readable":
            return whole
        return whole - (FLOAT - job.product_bytes) * job.num_weights * (2 if device == "cuda" else 1)
    if layout.engine != "deepspeed":
        return 0
    if layout.zero_stage < 3:
        return _copies(job, device)
    return whole + _copies(job, device) - FLOAT * _num_copied(job, device) * job.num_weights


def _gather_moment(job: Job, layout: Layout, device: str) -> Components:
    """ZeRO-3 gathers one weight after another and frees what it has copied; gloo has a copy of the last one."""
    if layout.engine != "deepspeed" or layout.zero_stage < 3:
        return {}
    weight, num_copied = FLOAT * job.num_weights, _num_copied(job, device)
    copied = weight if device == "cpu" else 0
    return {OPERANDS: _copies(job, device) + (1 if num_copied else 2) * weight + copied}


def _copies(job: Job, device: str) -> float:
    """Narrow copies of the float32 weights that products read."""
    return _num_copied(job, device) * job.product_bytes * job.num_weights


def _num_copied(job: Job, device: str) -> int:
    """Matrices of which there are narrow copies: a CPU decodes from the float32 weights."""
    if job.precision == "fp32" or job.step == "readable":
        return 0
    return 2 if device == "cuda" else 1


def _reduce_moment(job: Job, layout: Layout, device: str) -> Components:
    """Weights are free again: summed gradients beside those of this rank, and what is copied of a weight at a time."""
    whole, weight = FLOAT * job.num_parameters, FLOAT * job.num_weights
    part, copied = whole / layout.update_ranks, weight if device == "cpu" else 0  # by gloo
    if layout.engine == "fsdp":
        return {GRADIENTS: part + copied}
    if layout.engine != "deepspeed":
        return {}
    own = whole if job.step == "readable" else 0
    if layout.zero_stage == 3:
        return {GRADIENTS: own + part + copied}
    # The part that Adam reads, which is gone when gloo gathers the weights; DeepSpeed copies gradients of autograd, and
    # takes the norms of those that it offloads in float64.
    gathered = whole if device == "cpu" else 0
    normed = min(weight, part) * 2 + copied if layout.offload_optimizer else 0
    return {GRADIENTS: own + max(own + part, gathered, normed) + BUCKET}


def _sparse_moments(job: Job, layout: Layout, part: Part, device: str) -> list[Components]:
    """The moments of `train.sparse` in which most is alive."""
    sorted_codes = {SELECTION: part.codes * (2 * CODE)}
    narrow = device == "cuda" and job.precision == "bf16"  # copies of the batch and its gradient for the kernels
    moments = [
        encode_moment(job, layout, part, device),
        {
            BATCH: part.batch + (_errors(job) - 1) * part.own,
            SELECTION: part.codes * (CODE - FLOAT),
            AUXK: part.dead_matrix,
        },
        {
            BATCH: (2 + narrow) * part.batch + (2 + bool(part.dead)) * part.own,
            **sorted_codes,
            AUXK: part.dead_matrix,
        },
    ]
    if layout.latent_ranks > 1:  # partial sums or gathered gradients of all outputs, and what gloo copies
        passed = 1 + bool(part.dead) + (device == "cpu")
        codes = {SELECTION: part.codes * CODE, AUXK: part.dead_matrix}
        moments += [{BATCH: (1 + passed) * part.batch + _errors(job) * part.own, **codes}]
    if part.dead:
        chosen = INDEX * part.tokens * min(job.d_model / 2, part.dead)
        forward = max(3.5 * part.dead_matrix + chosen, part.dead_matrix + part.dead_rows)
        backward = max(3.25 * part.dead_matrix, 2.25 * part.dead_matrix + part.dead_rows)
        selected = {SELECTION: part.codes * (CODE + 2 * INDEX)}
        moments += [{BATCH: part.batch, **selected, AUXK: forward}]
        moments += [{BATCH: 3 * part.batch + 2 * part.own, **selected, AUXK: backward}]
    return moments


def _errors(job: Job) -> int:
    """Buffers of the size of the batch while the loss is differentiated."""
    return 5 + (1 if job.num_dead else 0) + job.has_delta


def encode_moment(job: Job, layout: Layout, part: Part, device: str) -> Components:
    """One chunk of codes, and the candidates among them: of all ranks' codes any rank may have found the largest."""
    chunk = chunk_latents(int(part.tokens), int(part.latents), job.product_bytes, device)
    in_chunk = part.tokens * chunk
    # In one chunk a sample bounds them closely; over several they grow until twice as many as are kept.
    is_one = chunk >= part.latents and job.num_micro_steps == 1
    on_cpu = min(in_chunk * job.num_micro_steps, max((1.1 if is_one else 2) * job.num_selected, SAMPLE_SIZE))
    candidates = in_chunk + 3 * job.num_selected if device == "cuda" else on_cpu
    size = CANDIDATE_OF_RANKS if device == "cpu" and layout.num_ranks > 1 else CANDIDATE[device]
    narrow = part.batch / 2 if job.precision == "bf16" else 0
    return {
        BATCH: part.batch + narrow,
        CODES: job.product_bytes * in_chunk,
        SELECTION: size * candidates,
    }


def _readable_moments(job: Job, layout: Layout, part: Part) -> list[Components]:
    """The moments of `train.readable` and its backward pass, in bf16 with copies of what is multiplied.

    Gradients are made anew in each step; of those that the state has, what does not exist yet is taken off again. In
    fsdp they are there always, and each is made beside them before it is added; of W_dec, where AuxK has a share, both
    parts and their sum.
    """
    weight = FLOAT * part.latents * part.width
    there = 0 if layout.engine == "deepspeed" else 2
    narrow, auxk = float(job.precision == "bf16"), float(part.dead > 0)
    beside = 0, 1 + 2 * auxk, 1 + auxk

    def moment(made: int, batches: float, matrices: float, copies: float, dead: float = 0) -> Components:
        return {
            GRADIENTS: (beside[made] if layout.engine == "fsdp" else made - there) * weight,
            BATCH: batches * part.batch,
            CODES: matrices * part.matrix,
            OPERANDS: copies * narrow * weight,
            SELECTION: part.codes * (2 * INDEX + FLOAT),
            AUXK: dead,
        }

    dead_forward = (3 + narrow / 2) * part.dead_matrix + (1 + narrow / 2) * part.dead_rows
    dead_loss = (2.5 - narrow) * part.dead_matrix + (1 - narrow / 2) * part.dead_rows
    return [
        moment(0, 1 + narrow / 2, 4 - 0.4 * narrow, 0),
        moment(0, 2 + 1.5 * narrow + (1 - narrow / 2) * auxk, 2 - narrow / 2, 0.5, dead_forward),
        moment(0, _errors(job) + narrow / 2, 2 - narrow / 2, 0.5, dead_loss),
        moment(1, 3 + auxk - narrow / 2 * (1 - auxk), 3, auxk),
        moment(2, 2 + (2 - narrow / 2) * auxk, 2 - 2 * narrow + (2 + narrow / 2) * auxk, 0.5),
    ]


def largest(moments: list[Components]) -> Components:
    """The moment in which most is alive."""
    return max(moments, key=lambda moment: sum(moment.values()))


def add(first: Components, second: Components) -> Components:
    """Component by component, of all components."""
    return {name: first.get(name, 0) + second.get(name, 0) for name in COMPONENTS}
