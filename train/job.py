"""What the memory and time of a training step depend on, as plain numbers: the job, and its layout over GPUs.

Nothing here needs a model, a store or a GPU. Shapes: B tokens, M models, D width, W = M * D, L latents, S = k * B
codes.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Job:
    """One training step, of all ranks together."""

    # B, M, D, L and k.
    num_tokens: int
    num_models: int
    d_model: int
    num_latents: int
    k: int
    # Dead latents that AuxK revives; 0 = none, or no AuxK.
    num_dead: int = 0
    # Whether the loss has a delta term.
    has_delta: bool = False
    # Parts of a rank's tokens that are differentiated one after another.
    num_micro_steps: int = 1
    # readable or sparse; fp32 or bf16 products.
    step: str = "sparse"
    precision: str = "fp32"
    # Bytes of a stored token, all models together, scales included.
    stored_token_bytes: int = 0

    @property
    def width(self) -> int:
        """W."""
        return self.num_models * self.d_model

    @property
    def num_selected(self) -> int:
        """S."""
        return self.k * self.num_tokens

    @property
    def num_weights(self) -> int:
        """Entries of one weight matrix, encoder or decoder."""
        return self.num_latents * self.width

    @property
    def num_parameters(self) -> int:
        """2 L W + L + W."""
        return 2 * self.num_weights + self.num_latents + self.width

    @property
    def product_bytes(self) -> int:
        """Bytes of a value in the products."""
        return 2 if self.precision == "bf16" else FLOAT


@dataclass(frozen=True)
class Layout:
    """An engine on a number of ranks."""

    engine: str
    num_ranks: int = 1
    # Of deepspeed: the stage of ZeRO, and whether Adam's moments lie in the host's memory.
    zero_stage: int = 0
    offload_optimizer: bool = False
    # Of fsdp and latent: ranks that have all weights among them; None = all ranks.
    ranks_per_copy: int | None = None

    @property
    def label(self) -> str:
        if self.engine == "deepspeed":
            return f"ZeRO-{self.zero_stage}" + ("+cpu" if self.offload_optimizer else "")
        return self.engine if self.num_copies == 1 else f"{self.engine}/{self.ranks_per_copy}"

    @property
    def setting(self) -> str:
        """How a command line asks for it."""
        stage = f" engine.zero_stage={self.zero_stage}" if self.engine == "deepspeed" else ""
        offload = " engine.offload_optimizer=true" if self.offload_optimizer else ""
        copies = f" engine.ranks_per_copy={self.ranks_per_copy}" if self.num_copies > 1 else ""
        return f"engine={self.engine}{stage}{offload}{copies}"

    @property
    def copy_ranks(self) -> int:
        """Ranks among which what is divided is divided."""
        return self.ranks_per_copy or self.num_ranks

    @property
    def num_copies(self) -> int:
        return self.num_ranks // self.copy_ranks

    @property
    def token_ranks(self) -> int:
        """Ranks, or groups of them, among which the tokens of a step are divided: in `latent` the ranks of a group
        encode the tokens of all of them.
        """
        return self.num_copies if self.engine == "latent" else self.num_ranks

    @property
    def latent_ranks(self) -> int:
        """Ranks among which the latents are divided."""
        return self.copy_ranks if self.engine == "latent" else 1

    @property
    def update_ranks(self) -> int:
        """Ranks among which Adam's update is divided."""
        return self.copy_ranks


def layouts(num_gpus: int, ranks_per_copy: int | None = None, offload_optimizer: bool = False) -> list[Layout]:
    """What `num_gpus` allow: one process and, from two on, the engines that divide the work; fsdp and latent over all
    ranks and, if that is asked for, with a copy of the weights on every `ranks_per_copy` ranks.
    """
    if num_gpus == 1:
        return [Layout("single")]
    copies = [None] if ranks_per_copy in (None, num_gpus) else [None, ranks_per_copy]
    fsdp, latent = ([Layout(name, num_gpus, ranks_per_copy=n) for n in copies] for name in ("fsdp", "latent"))
    stages = [Layout("deepspeed", num_gpus, stage, offload_optimizer) for stage in (1, 2, 3)]
    return [Layout("single"), *fsdp, *stages, *latent]
