"""How long a training step takes on a GPU: a roofline per part of the step, links, and the store's reading rate.

    part          = max(FLOPs / FLOP/s, bytes / (bytes/s))        rates = peaks times the share that is attained
    communication = bytes that a GPU sends / link rate            not hidden behind the products
    step          = max(sum of parts + communication, reading)    reading runs ahead of the step, beside it

Per GPU with b tokens and l latents in its products, Z dead latents and p bytes a value of products:

    encoder product     2 b l W FLOPs                W_enc, x and the codes moved once
    dense autograd      10 b l W FLOPs               five products (training.step=readable)
    kept codes          8 S W FLOPs, S = k b         rows of W_dec, x and the gradient for each; whole gradients written
    AuxK                8 b Z W FLOPs                four products with dead latents
    Adam                32 bytes a float32 weight    weight, moments read and written, gradient read twice; bf16 copy +2
    copies of weights   bytes read and written       gathered weights copied out, operands made anew

Bytes that a GPU sends among the R ranks that divide something, times (R - 1) / R, with N parameters and B tokens of
these ranks (`sent_within`). Gathering n bytes sends n, reducing them so that each rank has its part n, an all-reduce
2 n. Zero redundancy (ZeRO): arXiv 1910.02054.

    fsdp                weights and norms gathered once, gradients reduced in float32      N (4 + p) + 4 L M
    ZeRO                gradients reduced and weights gathered, both in float32            8 N
    latent              tokens gathered as stored, with their numbers; partial sums of reconstructions (and
                        AuxK's) reduced, their gradients gathered; counts of AuxK's scores all-reduced; for AuxK
                        in several micro-batches errors are known only after another reconstruction, which has no
                        gradient (4 W more)                                                B (stored + 8 W + 8)

Between C copies of all weights (engine.ranks_per_copy = R) each rank's N / R gradients are all-reduced: 8 N / R bytes
times (C - 1) / C (`sent_across`). All ranks all-reduce counts of the selection and of silent latents (`sent_by_all`).
"""

from __future__ import annotations

from dataclasses import dataclass

from train.gpus import Gpu
from train.job import FLOAT, Job, Layout
from train.radix import DIGIT_BITS
from train.row_cut import BITS

# Passes over the (tokens, latents) matrix besides the products: candidates are read and written; dense autograd also
# scales, ranks, masks and scatters, and the same backwards.
SPARSE_PASSES, DENSE_PASSES = 2, 12
# The dense products: every step has the first, dense autograd the others as well.
PRODUCTS = ("encoder product", "four more products")
ADAM_BYTES = 8 * FLOAT  # weight and two moments read and written, gradient read for its norm and for the update
SHADOW_BYTES = 2  # a bf16 copy of a weight
# Bits of a float32 score that can be positive; bytes of a count or of a number in float64, and of a token's number.
KEY_BITS, COUNT, NUMBER = 31, 8, 8


@dataclass(frozen=True)
class Machine:
    """GPUs, what they attain, and how they are joined and fed; rates in units a second."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    # Share of the GPU's and links' peak rates that a step attains.
    efficiency: float
    # GB/s between nodes, per GPU, and at which the store is read, by all ranks together.
    network_gbps: float
    read_gbps: float

    def flops(self, precision: str) -> float:
        return self.efficiency * self.gpu.tflops(precision) * 1e12

    @property
    def memory_rate(self) -> float:
        return self.efficiency * self.gpu.memory_gbps * 1e9

    def link_rate(self, num_gpus: int) -> float:
        """Of the slowest link in a ring through so many neighbouring GPUs."""
        within_node = num_gpus <= self.gpus_per_node
        return self.efficiency * 1e9 * (self.gpu.link_gbps if within_node else self.network_gbps)


@dataclass(frozen=True)
class Work:
    """One part of a step on one GPU."""

    name: str
    flops: float
    bytes: float

    def seconds(self, machine: Machine, precision: str) -> float:
        return max(self.flops / machine.flops(precision), self.bytes / machine.memory_rate)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; `read` passes beside the rest."""

    parts: dict[str, float]
    communication: float
    read: float

    @property
    def work(self) -> float:
        return sum(self.parts.values()) + self.communication

    @property
    def step(self) -> float:
        return max(self.work, self.read)

    @property
    def bound_by(self) -> str:
        """What would have to be faster first."""
        if self.read > self.work:
            return "reading"
        largest = {**self.parts, "communication": self.communication}
        return max(largest, key=largest.__getitem__)


def step_time(job: Job, layout: Layout, machine: Machine) -> StepTime:
    """What a step takes, with `job.num_dead` latents for AuxK."""
    parts = {work.name: work.seconds(machine, job.precision) for work in step_work(job, layout)}
    read = job.num_tokens * job.stored_token_bytes / (machine.read_gbps * 1e9)
    within = sent_within(job, layout) / machine.link_rate(layout.copy_ranks)
    across = (sent_across(job, layout) + sent_by_all(job, layout)) / machine.link_rate(layout.num_ranks)
    return StepTime(parts, within + across, read)


def step_work(job: Job, layout: Layout) -> list[Work]:
    """The parts of a step on one GPU."""
    tokens, latents = job.num_tokens / layout.token_ranks, job.num_latents / layout.latent_ranks
    width, size = job.width, job.product_bytes
    matrix, weight, batch = size * tokens * latents, size * latents * width, size * tokens * width
    codes, dead = job.num_selected / layout.num_ranks, job.num_dead / layout.latent_ranks
    gradients = 2 * FLOAT * latents * width
    encoder, others = PRODUCTS
    products = [Work(encoder, 2 * tokens * latents * width, matrix + weight + batch)]
    if job.step == "readable":
        products += [
            Work(others, 8 * tokens * latents * width, 4 * (matrix + weight + batch) + gradients),
            Work("selection, masks", 0, DENSE_PASSES * matrix),
        ]
    else:
        # Rows of W_dec for the decode; then, much of it from the cache, of W_dec, the gradient and x for each code.
        gathered = 3 * size * codes * width
        products += [
            Work("selection", 0, SPARSE_PASSES * matrix),
            Work("kept codes", 8 * codes * width, gathered + weight + 2 * batch + gradients),
        ]
    if dead:
        products.append(Work("AuxK", 8 * tokens * dead * width, 4 * size * (tokens + width) * dead))
    copied = _copied_bytes(job, layout) * job.num_weights * 2
    products += [Work("copies of weights", 0, copied)] if copied else []
    return [*products, Work("Adam", 0, _adam_bytes(job, layout) * job.num_parameters / layout.update_ranks)]


def step_flops(job: Job) -> float:
    """FLOPs of a step, all ranks together."""
    return sum(work.flops for work in step_work(job, Layout("single")))


def sent_bytes(job: Job, layout: Layout) -> float:
    """Bytes that each GPU sends in a step."""
    return sent_within(job, layout) + sent_across(job, layout) + sent_by_all(job, layout)


def sent_within(job: Job, layout: Layout) -> float:
    """Bytes that each GPU sends to those with which it divides weights, latents or Adam's update."""
    others = (layout.copy_ranks - 1) / layout.copy_ranks
    if layout.engine == "latent":
        return others * job.num_tokens / layout.num_copies * _latent_token_bytes(job)
    if layout.engine == "deepspeed":
        return others * job.num_parameters * 2 * FLOAT
    norms = FLOAT * job.num_latents * job.num_models
    return others * (_gathered_bytes(job) + FLOAT * job.num_parameters + norms)


def _latent_token_bytes(job: Job) -> int:
    """Of a token: itself and its number, outputs and their gradients, AuxK's cut, errors for their variance."""
    output = FLOAT * job.width
    token = job.stored_token_bytes + NUMBER + 2 * output
    if not job.num_dead:
        return token
    ties = 2 * FLOAT  # scores above the cut and at it
    return token + 2 * output + 2 * _count_bytes(KEY_BITS, BITS, FLOAT, 1) + ties + output * (job.num_micro_steps > 1)


def sent_across(job: Job, layout: Layout) -> float:
    """Bytes that each GPU sends to those of other copies that have the same part."""
    others, is_latent = (layout.num_copies - 1) / layout.num_copies, layout.engine == "latent"
    values = job.num_parameters + (job.num_latents if is_latent else 0)  # gradients, and which latents fired
    return others * 2 * FLOAT * values / layout.copy_ranks


def sent_by_all(job: Job, layout: Layout) -> float:
    """Bytes that each GPU sends in all-reduces of all ranks, which depend little on the engine."""
    places = (job.num_tokens * job.num_latents - 1).bit_length()
    counts = _count_bytes(KEY_BITS, DIGIT_BITS, COUNT) + _count_bytes(places, DIGIT_BITS, COUNT)
    variance = COUNT * job.width if job.num_dead else 0
    shared = job.width if layout.engine == "latent" else job.num_latents  # the gradient of b_dec; which latents fired
    return (layout.num_ranks - 1) / layout.num_ranks * 2 * (counts + variance + FLOAT * shared)


def _count_bytes(num_bits: int, digit_bits: int, size: int, implied: int = 0) -> int:
    """Of the counts that find a number of `num_bits` bits digit by digit; `implied` of each digit's are not sent."""
    whole, rest = divmod(num_bits, digit_bits)
    return size * (whole * (2**digit_bits - implied) + (2**rest - implied if rest else 0))


def _gathered_bytes(job: Job) -> int:
    """Of the weights that fsdp gathers: biases are not narrow."""
    biases = job.num_parameters - 2 * job.num_weights
    return 2 * job.num_weights * (FLOAT if job.step == "readable" else job.product_bytes) + FLOAT * biases


def _copied_bytes(job: Job, layout: Layout) -> int:
    """Read and written, for each weight of a matrix, apart from products and Adam's pass."""
    if layout.engine == "fsdp":
        return 2 * (FLOAT if job.step == "readable" else job.product_bytes)
    return FLOAT + job.product_bytes if layout.engine == "deepspeed" and job.precision == "bf16" else 0


def _adam_bytes(job: Job, layout: Layout) -> int:
    """Read and written for each weight; the rows that fsdp gathers are made narrow in another pass."""
    shadow = SHADOW_BYTES if job.precision == "bf16" and layout.engine != "deepspeed" else 0
    return ADAM_BYTES + shadow
