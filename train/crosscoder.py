"""The BatchTopK crosscoder: one dictionary of latents that reads and reconstructs the activations of several models.

    pre   = ReLU( sum_m x_m W_enc[m] + b_enc )            (B, L)
    s_j   = sum_m ||W_dec[j, m]||_2                       code normalisation "crosscoder"
    acts  = pre where pre * s > threshold, else 0         inference; training keeps the k*B largest pre * s of a batch
    recons_m = acts W_dec[:, m] + b_dec[m]

Sources: Lindsey et al., "Sparse Crosscoders" (2024); Minder et al. (arXiv 2504.02922); BatchTopK (arXiv 2412.06410);
dedicated latents (arXiv 2602.11729). Shapes: B tokens, M models, D width, L latents, W = M * D. Weights are
latent-major, one row per latent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extract.errors import BadInput
from train.config import CrosscoderConfig
from train.folder import publishing_folder, sha256_of

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE = "crosscoder.safetensors", "config.json"


class Crosscoder(nn.Module):
    """Weights and the plain maths on them. New weights are zero; see `train.initialisation`.

    Where ranks divide the latents, each has a crosscoder of its own part: L and `num_latents` are then those of the
    part, and reconstructions lack what other parts add; `config.num_latents` is that of the whole.

    Attributes:
        latents: the numbers of the L latents it holds among all, a contiguous part of them or, for `save`, all.
        W_enc, W_dec: (L, M*D); b_enc: (L,); b_dec: (M*D,), all in the space of scaled activations.
        activation_mean: (M, D), activation_scale: (M,); scaled = (raw - activation_mean) * activation_scale.
        dedicated_owner: (L,) int8; -1 = any model, else the index of the only model that may own the latent.
        threshold: of scaled codes pre * s at inference; None until training has reached `threshold_start_step`.
        models: names, index 0 = base; MODEL@HOOKPOINT where a pair named the hookpoint.
        hookpoint: "block20", or one for each model where they differ, "block10,block20".
        trained_with: settings that decide the result and hashes of the data; empty where `save` was not told.
    """

    activation_mean: Tensor
    activation_scale: Tensor
    dedicated_owner: Tensor
    _foreign_rows_R: Tensor

    def __init__(
        self,
        config: CrosscoderConfig,
        models: Sequence[str],
        d_model: int,
        hookpoint: str,
        latents: range | None = None,
    ):
        super().__init__()
        self.config, self.models, self.d_model, self.hookpoint = config, list(models), d_model, hookpoint
        self.latents = range(config.num_latents) if latents is None else latents
        self.threshold: float | None = None
        self.trained_with: dict[str, Any] = {}
        num_models, width = len(self.models), len(self.models) * d_model
        self.W_enc = nn.Parameter(torch.zeros(self.num_latents, width))
        self.b_enc = nn.Parameter(torch.zeros(self.num_latents))
        self.W_dec = nn.Parameter(torch.zeros(self.num_latents, width))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.register_buffer("activation_mean", torch.zeros(num_models, d_model))
        self.register_buffer("activation_scale", torch.ones(num_models))
        self.register_buffer("dedicated_owner", _owners(config, num_models)[self.latents.start : self.latents.stop])
        # Rows of the weights seen as (L * M, D); held ready, for a GPU would have to wait for a mask's count.
        self.register_buffer("_foreign_rows_R", self.foreign_rows().flatten().nonzero().squeeze(1), persistent=False)

    @property
    def num_models(self) -> int:
        return len(self.models)

    @property
    def num_latents(self) -> int:
        return len(self.latents)

    def scale(self, x_BMD: Tensor) -> Tensor:
        """Raw activations to the space that the weights live in: (x - activation_mean) * activation_scale."""
        return (x_BMD.to(self.W_enc.dtype) - self.activation_mean) * self.activation_scale[:, None]

    def unscale(self, x_BMD: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return x_BMD / self.activation_scale[:, None] + self.activation_mean

    def decoder_norms(self) -> Tensor:
        """||W_dec[j, m]||_2, (L, M)."""
        return self.W_dec.detach().view(-1, self.num_models, self.d_model).norm(dim=2)

    def latent_scale(self, norms_LM: Tensor | None = None) -> Tensor:
        """s (L,) of the code normalisation, which only ranks codes: no gradient flows through it.

        `norms_LM` are the decoder norms, where the caller has them at hand.
        """
        norms_LM = self.decoder_norms() if norms_LM is None else norms_LM
        if self.config.code_normalization == "none":
            return norms_LM.new_ones(len(norms_LM))
        return norms_LM.sum(1) if self.config.code_normalization == "crosscoder" else norms_LM.norm(dim=1)

    def pre_activations(self, x_BMD: Tensor) -> Tensor:
        """pre (B, L) of scaled activations. The decoder bias is not subtracted from x."""
        return torch.addmm(self.b_enc, x_BMD.flatten(1), self.W_enc.T).relu_()

    def reconstruct(self, acts_BL: Tensor) -> Tensor:
        """recons (B, M, D) in the scaled space."""
        return torch.addmm(self.b_dec, acts_BL, self.W_dec).view(-1, self.num_models, self.d_model)

    def encode(self, x_BMD: Tensor) -> Tensor:
        """Raw activations (B, M, D) to unscaled codes (B, L): pre where pre * s > threshold, else 0.

        Raises BadInput before training has set a threshold.
        """
        if self.threshold is None:
            raise BadInput(
                "This crosscoder has no threshold yet: training sets it from step "
                f"crosscoder.threshold_start_step={self.config.threshold_start_step} on. Train further before encoding."
            )
        pre_BL = self.pre_activations(self.scale(x_BMD))
        return torch.where(pre_BL * self.latent_scale() > self.threshold, pre_BL, 0.0)

    def decode(self, acts_BL: Tensor) -> Tensor:
        """Codes (B, L) to raw activations (B, M, D)."""
        return self.unscale(self.reconstruct(acts_BL))

    def foreign_rows(self) -> Tensor:
        """Mask (L, M) of the encoder and decoder rows that a dedicated latent must not have."""
        owner_L1 = self.dedicated_owner[:, None]
        return (owner_L1 >= 0) & (owner_L1 != torch.arange(self.num_models, device=owner_L1.device))

    @torch.no_grad()
    def zero_foreign_rows(self, *weights_LW: Tensor) -> None:
        """Zero, in place, the rows that dedicated latents must not have: of weights, or of gradients."""
        for weight_LW in weights_LW:
            weight_LW.view(-1, self.d_model).index_fill_(0, self._foreign_rows_R, 0.0)

    def save(self, folder: str | Path) -> None:
        """Write `crosscoder.safetensors` and `config.json` as `folder`, which appears whole or not at all."""
        assert self.num_latents == self.config.num_latents, "A part of a crosscoder is not saved by itself."
        config = {
            "format_version": FORMAT_VERSION,
            "models": self.models,
            "hookpoint": self.hookpoint,
            "d_model": self.d_model,
            "threshold": self.threshold,
            "crosscoder": asdict(self.config),
            "trained_with": self.trained_with,
        }
        with publishing_folder(Path(folder)) as partial:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()},
                partial / WEIGHTS_FILE,
            )
            config["sha256"] = sha256_of(partial / WEIGHTS_FILE)
            (partial / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Crosscoder:
        """The crosscoder that `save` wrote. BadInput for a folder that is missing, damaged or holds something else."""
        folder = Path(folder)
        config = _read_config(folder)
        crosscoder = cls(
            CrosscoderConfig(**config["crosscoder"]), config["models"], config["d_model"], config["hookpoint"]
        )
        try:
            crosscoder.load_state_dict(_intact_weights(folder, config))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise _damaged(folder / WEIGHTS_FILE, error) from error
        crosscoder.threshold, crosscoder.trained_with = config["threshold"], config.get("trained_with", {})
        return crosscoder.to(device)


def intact_trained_with(folder: Path) -> dict[str, Any]:
    """`trained_with` of the crosscoder that `save` wrote, with no weights in memory. BadInput as by `load`."""
    config = _read_config(folder)
    if "sha256" not in config:  # an early one, whose weights only loading can judge
        return Crosscoder.load(folder).trained_with
    path, size = folder / WEIGHTS_FILE, CrosscoderConfig(**config["crosscoder"]).num_latents
    num_models, d_model = len(config["models"]), config["d_model"]
    shapes = {"W_enc": [size, num_models * d_model], "activation_mean": [num_models, d_model]}
    try:
        _check_sha256(path, config)
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in shapes}
        if found != shapes:
            raise ValueError(f"its weights are of {found}, and {CONFIG_FILE} says {shapes}")
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error
    found_with: dict[str, Any] = config.get("trained_with", {})
    return found_with


def _owners(config: CrosscoderConfig, num_models: int) -> Tensor:
    """The first `dedicated * L` latents belong to model 0, the next to model 1, ...; the rest to all."""
    each = int(config.dedicated * config.num_latents + 1e-9)  # 0.29 * 100 is 28.999...
    owner_L = torch.full((config.num_latents,), -1, dtype=torch.int8)
    owner_L[: each * num_models] = torch.arange(num_models, dtype=torch.int8).repeat_interleave(each)
    return owner_L


def _intact_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder; ValueError when they are not what was saved, as far as its configuration tells."""
    _check_sha256(folder / WEIGHTS_FILE, config)
    return load_file(folder / WEIGHTS_FILE)


def _check_sha256(path: Path, config: dict[str, Any]) -> None:
    if "sha256" in config and sha256_of(path) != config["sha256"]:
        raise ValueError(f"its sha256 is not the one in {CONFIG_FILE}")


def _damaged(weights: Path, error: Exception) -> BadInput:
    return BadInput(f"{weights} is missing or damaged ({error}). Copy the folder again or train again.")


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise BadInput(
            f"{folder} holds no crosscoder: {CONFIG_FILE} is missing. Give the folder crosscoder/ of a finished run."
        )
    try:
        config = json.loads(path.read_bytes())
        version = config["format_version"]
        missing = {"models", "hookpoint", "d_model", "threshold", "crosscoder"} - config.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} does not describe a crosscoder of this project ({error!r}). Give the folder crosscoder/ of a run."
        ) from error
    if version != FORMAT_VERSION or missing:
        raise BadInput(
            f"{path} has format version {version}, this release reads {FORMAT_VERSION} "
            f"(missing entries: {sorted(missing) or 'none'}). Use the release that wrote it, or train again."
        )
    return config
