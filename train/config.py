"""Settings of `python -m train`: the sections crosscoder, training, data and engine, and their cross-checks.

A dataclass field is a setting, its comment is its documentation, its default is the only default.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from extract.config import ExtractSettings
from extract.errors import BadInput
from train.checks import choice, multiple, not_negative, positive, share
from train.zero_config import deepspeed_config


@dataclass
class CrosscoderConfig:
    """The dictionary and its objective."""

    # Number of latents L.
    num_latents: int = 4096
    # Latents that a token activates on average: k * num_tokens_per_step entries of a batch are kept.
    k: int = 100
    # How decoder norms weigh a latent in the selection: crosscoder (sum of the models' norms), sae (norm of all
    # together), none.
    code_normalization: str = "crosscoder"
    # Reconstruction loss: norm (mean Euclidean norm of the error, not squared) or squared (mean squared norm).
    loss: str = "norm"
    # Weight of the auxiliary loss that revives dead latents; 0 = none.
    auxk_alpha: float = 1 / 32
    # A latent that was silent for this many tokens is dead.
    dead_after_tokens: int = 10_000_000
    # First step whose batch feeds the inference threshold.
    threshold_start_step: int = 1000
    # Decay of the threshold's moving average over steps.
    threshold_decay: float = 0.999
    # Initial directions: same (for all models), random (drawn per model), data (centred activations of the first
    # batch).
    init: str = "same"
    # Share of the latents that each model owns alone: the other models' encoder and decoder rows stay zero.
    dedicated: float = 0.0
    # Weight of an extra loss on the error of the difference between a tuned model and the base; 0 = none.
    delta_weight: float = 0.0
    # Scaling of activations per model: norm (mean norm becomes sqrt(d_model)), mean_variance (mean 0, mean variance 1),
    # none.
    activation_scaling: str = "norm"

    def check(self) -> None:
        """Checks that concern this section alone."""
        positive("crosscoder", num_latents=self.num_latents, k=self.k, dead_after_tokens=self.dead_after_tokens)
        not_negative("crosscoder", auxk_alpha=self.auxk_alpha, delta_weight=self.delta_weight, dedicated=self.dedicated)
        not_negative("crosscoder", threshold_start_step=self.threshold_start_step)
        choice("crosscoder.code_normalization", self.code_normalization, ("crosscoder", "sae", "none"))
        choice("crosscoder.loss", self.loss, ("norm", "squared"))
        choice("crosscoder.init", self.init, ("same", "random", "data"))
        choice("crosscoder.activation_scaling", self.activation_scaling, ("norm", "none", "mean_variance"))
        share("crosscoder.threshold_decay", self.threshold_decay)
        if self.k > self.num_latents:
            raise BadInput(
                f"crosscoder.k={self.k} exceeds crosscoder.num_latents={self.num_latents}. "
                "A token cannot activate more latents than there are: lower k or raise num_latents."
            )


@dataclass
class TrainingConfig:
    """The run: how long, how fast, what is written when."""

    # Tokens to train on, whole epochs or not; the last step is a full one.
    num_tokens: int = 200_000_000
    # Tokens of one step over all ranks; a multiple of the number of ranks.
    num_tokens_per_step: int = 2048
    # Parts in which each rank differentiates its tokens of a step, one after another: less memory, the same result. A
    # divisor of num_tokens_per_step over the number of ranks.
    num_micro_steps: int = 1
    # Peak learning rate of Adam.
    lr: float = 1e-4
    # Steps over which the learning rate rises linearly from zero.
    warmup_steps: int = 1000
    # Last share of the steps, over which the learning rate falls linearly to zero.
    decay_fraction: float = 0.0
    # Gradients of a larger global norm are scaled down to it.
    max_grad_norm: float = 1.0
    # Adam's decay rates of the first and second moments.
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # How a step is computed: sparse (fast) or readable (dense autograd); equal to rounding.
    step: str = "sparse"
    # Precision of the encoder product and, on a GPU, of what the sparse products read: fp32 or bf16. Sums, master
    # weights, Adam, statistics and the threshold are fp32 or wider in both.
    precision: str = "fp32"
    # Device of the crosscoder: auto, cpu, cuda, cuda:1, ...
    device: str = "auto"
    # Steps between checkpoints; 0 = only when the run stops.
    checkpoint_every: int = 1000
    # Newest checkpoints to keep.
    keep_checkpoints: int = 2
    # Checkpoints of every so many steps are kept besides, for good; 0 = none.
    keep_every: int = 0
    # Steps between lines of metrics.jsonl.
    log_every: int = 10
    # Steps between passes over held-out tokens; 0 = only at the end.
    validate_every: int = 1000
    # Held-out tokens, of data.max_validation_tokens, on which these passes also measure loss recovered, with the whole
    # language models in the memory of every rank (train/recovered.py); 0 = none, and train.evaluate can do it later.
    recovered_tokens: int = 0

    @property
    def num_steps(self) -> int:
        return -(-self.num_tokens // self.num_tokens_per_step)

    def check(self) -> None:
        """Checks that concern this section alone."""
        positive("training", num_tokens=self.num_tokens, num_tokens_per_step=self.num_tokens_per_step, lr=self.lr)
        positive(
            "training",
            max_grad_norm=self.max_grad_norm,
            num_micro_steps=self.num_micro_steps,
            keep_checkpoints=self.keep_checkpoints,
            log_every=self.log_every,
        )
        not_negative("training", warmup_steps=self.warmup_steps, decay_fraction=self.decay_fraction)
        not_negative("training", checkpoint_every=self.checkpoint_every, keep_every=self.keep_every)
        not_negative("training", validate_every=self.validate_every, recovered_tokens=self.recovered_tokens)
        choice("training.step", self.step, ("readable", "sparse"))
        choice("training.precision", self.precision, ("fp32", "bf16"))
        multiple("training.num_tokens_per_step", self.num_tokens_per_step, self.num_micro_steps, "num_micro_steps")
        if len(self.adam_betas) != 2:
            raise BadInput(f"training.adam_betas={self.adam_betas} must be two numbers, such as [0.9,0.999].")
        for beta in self.adam_betas:
            share("training.adam_betas", beta)
        if self.decay_fraction > 1:
            raise BadInput(
                f"training.decay_fraction={self.decay_fraction} is a share of the run: give a number from 0 to 1."
            )
        if self.warmup_steps >= self.num_steps:
            raise BadInput(
                f"training.warmup_steps={self.warmup_steps} is no shorter than the run of {self.num_steps} steps "
                f"(training.num_tokens={self.num_tokens} / training.num_tokens_per_step={self.num_tokens_per_step}). "
                "Shorten the warm-up or train on more tokens."
            )


@dataclass
class DataConfig:
    """Which documents are trained on and which only measure."""

    # Where activations come from: stored, or online, which has the models compute them from the tokens while training.
    mode: str = "stored"
    # Share of the documents, chosen by a hash of their content, that are never trained on; 0 = no validation.
    heldout_fraction: float = 0.05
    # Held-out tokens to measure on, a random choice of documents; null = all.
    max_validation_tokens: int | None = 200_000
    # Streams of shards that every batch draws from in turn; a multiple of the number of ranks.
    num_lanes: int = 64
    # Tokens of a lane that are shuffled together; num_lanes * shuffle_window tokens are in use at a time, and as many
    # are read ahead.
    shuffle_window: int = 8192
    # Folder on a disk of the node, to which shards are copied when they are first read; null = read where they are.
    staging: str | None = None
    # Threads that read batches ahead of the step.
    num_threads: int = 4
    # With mode=online: tokens, in evenly spaced shards, that statistics and the norm of outliers come from.
    calibration_tokens: int = 1_000_000
    # With mode=online: memory that the activations of a rank may take, in 10^9 bytes; null = its part of what the host
    # has.
    memory_gb: float | None = None

    def check(self) -> None:
        """Checks that concern this section alone."""
        choice("data.mode", self.mode, ("stored", "online"))
        positive("data", calibration_tokens=self.calibration_tokens)
        if self.memory_gb is not None:
            positive("data", memory_gb=self.memory_gb)
        share("data.heldout_fraction", self.heldout_fraction)
        if self.max_validation_tokens is not None:
            positive("data", max_validation_tokens=self.max_validation_tokens)
        positive("data", num_lanes=self.num_lanes, shuffle_window=self.shuffle_window, num_threads=self.num_threads)


@dataclass
class EngineConfig:
    """Who computes a step, and where weights, gradients and Adam's moments lie. No engine changes the result."""

    # single: one process. fsdp: PyTorch's fully_shard divides weights and moments over ranks. deepspeed: ZeRO divides
    # them. latent: each rank has the weights and moments of a part of the latents.
    name: str = "single"
    # fsdp and latent: consecutive ranks that hold the weights once among them, for example the GPUs of a node; others
    # hold copies and share the tokens. A divisor of the number of ranks; null = all of them.
    ranks_per_copy: int | None = None
    # deepspeed: what is divided over ranks: 1 Adam's moments, 2 summed gradients too, 3 weights too, but in a step.
    # Every rank has whole gradients of its own tokens, so 1 and 2 need the same memory, and only 3 needs less.
    zero_stage: int = 2
    # deepspeed: whether Adam and its moments are kept in the host's memory.
    offload_optimizer: bool = False
    # deepspeed: a file with settings of DeepSpeed's own; those that are decided here are refused.
    deepspeed_json: str | None = None
    # Seconds that ranks wait for each other before all of them end.
    timeout_s: float = 600.0

    def check(self) -> None:
        """Checks that concern this section alone."""
        choice("engine", self.name, ("single", "fsdp", "deepspeed", "latent"))
        positive("engine", timeout_s=self.timeout_s)
        if self.ranks_per_copy is not None:
            positive("engine", ranks_per_copy=self.ranks_per_copy)
        if self.zero_stage not in (1, 2, 3):
            raise BadInput(f"engine.zero_stage={self.zero_stage} is not one of 1, 2, 3.")
        self._check_ranks_per_copy()
        self._check_deepspeed()

    def _check_ranks_per_copy(self) -> None:
        if self.ranks_per_copy is not None and self.name not in ("fsdp", "latent"):
            reason = "runs in one process" if self.name == "single" else "divides over all ranks"
            raise BadInput(
                f"engine.ranks_per_copy={self.ranks_per_copy} with engine={self.name}, which {reason}. Leave it "
                "out, or choose engine=fsdp or engine=latent."
            )

    def _check_deepspeed(self) -> None:
        if self.name == "deepspeed":
            deepspeed_config(self.zero_stage, self.offload_optimizer, self.deepspeed_json)
            return
        default = EngineConfig()
        for name in ("zero_stage", "offload_optimizer", "deepspeed_json"):
            value = getattr(self, name)
            if value != getattr(default, name):
                raise BadInput(
                    f"engine.{name}={value} is a setting of DeepSpeed, and engine={self.name} does not use it. "
                    "Leave it out, or choose engine=deepspeed."
                )


@dataclass
class SweepConfig:
    """Several runs at once, `python -m train -m`."""

    # Whether members on one machine train at the same time, those of the same data from one process that reads them.
    share_reader: bool = False


@dataclass
class TrainSettings(ExtractSettings):
    """All settings that training knows; analysis adds its own section."""

    crosscoder: CrosscoderConfig = field(default_factory=CrosscoderConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def check(self) -> None:
        super().check()
        for section in (self.crosscoder, self.training, self.data, self.engine):
            section.check()
        if self.seed < 0:
            raise BadInput(f"seed={self.seed} must not be negative.")
        self._check_threshold()
        self._check_dedicated()
        self._check_recovered()

    def _check_threshold(self) -> None:
        start, num_steps = self.crosscoder.threshold_start_step, self.training.num_steps
        if start >= num_steps:
            raise BadInput(
                f"crosscoder.threshold_start_step={start} is never reached in a run of {num_steps} steps "
                f"(training.num_tokens={self.training.num_tokens}), and inference needs a threshold. "
                f"Lower it, for example to {num_steps // 10}, or train on more tokens."
            )

    def _check_recovered(self) -> None:
        wanted = self.training.recovered_tokens
        if wanted and self.data.heldout_fraction == 0:
            raise BadInput(
                f"training.recovered_tokens={wanted} are held-out tokens, and data.heldout_fraction=0 holds out none. "
                f"Raise the fraction, or set training.recovered_tokens=0."
            )

    def _check_dedicated(self) -> None:
        num_models = max([len(members) for members in self.pairs.values()], default=2)
        each = self.crosscoder.dedicated
        if each * num_models > 1:
            raise BadInput(
                f"crosscoder.dedicated={each} for each of {num_models} models asks for more latents than there are. "
                f"Give at most {1 / num_models:g}."
            )
        if each > 0 and int(each * self.crosscoder.num_latents) == 0:
            raise BadInput(
                f"crosscoder.dedicated={each} of crosscoder.num_latents={self.crosscoder.num_latents} is less than "
                f"one latent. Give at least {1 / self.crosscoder.num_latents:g}, or 0."
            )
