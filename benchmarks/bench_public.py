"""Our training step against the recipe of the published BatchTopK crosscoder trainer, on the same tokens of a store.

python -m benchmarks.bench_public experiment=demo/base_simpo [outputs=PATH] [training.num_tokens=307200] [key=value ...]

The recipe (Minder et al., arXiv 2504.02922) in plain PyTorch, as their trainer computes it: weights model by model,
dense autograd, torch.topk over the flattened scaled codes, AuxK in dense (B, L) buffers, clipping, Adam. Both start
from the same weights and take each batch in turn; reported are the time of a step and, on held-out tokens with each
one's own threshold, variance explained. Options that the recipe lacks (dedicated latents, delta term) are switched off.

Shapes: B tokens, M models, D width, L latents.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.timing import machine
from extract.command import run
from extract.devices import choose_device
from train.config import TrainSettings
from train.crosscoder import Crosscoder
from train.data import ActivationPairs, heldout_batches
from train.engine import Engine, learning_rate_factor
from train.metrics import validation_metrics
from train.stream import BatchStream
from train.world import World

WARM_UP = 5  # steps that are not timed


class PublicCrosscoder(nn.Module):
    """Weights as published: encoder (M, D, L), decoder (M, L, D)."""

    def __init__(self, start: Crosscoder):
        super().__init__()
        shape = start.num_latents, start.num_models, start.d_model
        self.encoder = nn.Parameter(start.W_enc.detach().view(shape).permute(1, 2, 0).contiguous())
        self.encoder_bias = nn.Parameter(start.b_enc.detach().clone())
        self.decoder = nn.Parameter(start.W_dec.detach().view(shape).permute(1, 0, 2).contiguous())
        self.decoder_bias = nn.Parameter(start.b_dec.detach().view(shape[1:]).clone())

    def encode(self, x_BMD: Tensor) -> Tensor:
        """ReLU of the models' contributions, summed: (B, L)."""
        return torch.relu(torch.einsum("bmd,mdl->bml", x_BMD, self.encoder).sum(1) + self.encoder_bias)

    def code_normalization(self) -> Tensor:
        return self.decoder.norm(dim=2).sum(0)

    def decode(self, acts_BL: Tensor) -> Tensor:
        """Without the bias: (B, M, D)."""
        return torch.einsum("bl,mld->bmd", acts_BL, self.decoder)

    def copy_to(self, crosscoder: Crosscoder, threshold: float | None) -> None:
        """The same crosscoder in our layout, so that one function evaluates both."""
        with torch.no_grad():
            crosscoder.W_enc.copy_(self.encoder.permute(2, 0, 1).flatten(1))
            crosscoder.b_enc.copy_(self.encoder_bias)
            crosscoder.W_dec.copy_(self.decoder.permute(1, 0, 2).flatten(1))
            crosscoder.b_dec.copy_(self.decoder_bias.flatten())
        crosscoder.threshold = threshold


class PublicTrainer:
    """One update after another, in dense autograd."""

    def __init__(self, settings: TrainSettings, start: Crosscoder):
        self._config, self._training = settings.crosscoder, settings.training
        self.model, self.steps_done = PublicCrosscoder(start), 0
        self.threshold: float | None = None
        first, second = self._training.adam_betas
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=self._training.lr, betas=(first, second))
        self._silent_tokens_L = torch.zeros(start.num_latents, dtype=torch.int64)

    def step(self, x_BMD: Tensor) -> float:
        """The loss of a batch of scaled activations, after the update that it leads to."""
        post_relu_BL = self.model.encode(x_BMD)
        scaled_BL = post_relu_BL * self.model.code_normalization()
        acts_BL = self._batch_topk(post_relu_BL, scaled_BL)
        self._update_threshold(acts_BL.detach() * self.model.code_normalization().detach())
        error_BMD = x_BMD - (self.model.decode(acts_BL) + self.model.decoder_bias)
        fired_L = acts_BL.detach().sum(0) > 0
        self._silent_tokens_L += len(x_BMD)
        self._silent_tokens_L[fired_L] = 0
        loss = torch.linalg.norm(error_BMD, dim=-1).mean()
        auxk = self._auxk(error_BMD.detach(), post_relu_BL, scaled_BL.detach())
        loss = loss + self._config.auxk_alpha * auxk
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._training.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.lr * learning_rate_factor(self._training, self.steps_done)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps_done += 1
        return loss.item()

    def _batch_topk(self, post_relu_BL: Tensor, scaled_BL: Tensor) -> Tensor:
        flat = scaled_BL.flatten()
        kept = flat.topk(self._config.k * len(scaled_BL), sorted=False).indices
        return torch.zeros_like(flat).scatter(0, kept, post_relu_BL.flatten()[kept]).view_as(scaled_BL)

    def _update_threshold(self, acts_BL: Tensor) -> None:
        if self.steps_done < self._config.threshold_start_step:
            return
        smallest, decay = acts_BL[acts_BL > 0].min().item(), self._config.threshold_decay
        self.threshold = smallest if self.threshold is None else decay * self.threshold + (1 - decay) * smallest

    def _auxk(self, error_BMD: Tensor, post_relu_BL: Tensor, scaled_BL: Tensor) -> Tensor:
        dead_L = self._silent_tokens_L >= self._config.dead_after_tokens
        num_chosen = min(error_BMD.shape[2] // 2, int(dead_L.sum()))
        if num_chosen == 0:
            return error_BMD.new_zeros(())
        chosen_BK = torch.where(dead_L, scaled_BL, -torch.inf).topk(num_chosen, sorted=False).indices
        acts_BL = torch.zeros_like(post_relu_BL).scatter(1, chosen_BK, post_relu_BL.gather(1, chosen_BK))
        squared_error = (error_BMD - self.model.decode(acts_BL)).pow(2).sum((1, 2)).mean()
        variance = (error_BMD - error_BMD.mean(0)).pow(2).sum((1, 2)).mean()
        return (squared_error / variance).nan_to_num(0.0)


@dataclass
class Timed:
    """Seconds of each step and the last loss."""

    seconds: list[float]
    loss: float = 0.0

    def run(self, step: Callable[[], float]) -> None:
        start = time.perf_counter()
        self.loss = step()
        self.seconds.append(time.perf_counter() - start)


def main(settings: TrainSettings) -> None:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    settings.crosscoder = replace(
        settings.crosscoder, code_normalization="crosscoder", loss="norm", init="same", dedicated=0.0, delta_weight=0.0
    )
    training = settings.training
    pairs = ActivationPairs.open(settings)
    stream = BatchStream(pairs, settings.seed, training.num_tokens_per_step, settings.data)
    world = World.alone(choose_device(training.device, "training.device"))
    engine = Engine(settings, pairs.models, pairs.d_model, pairs.activation_mean, pairs.activation_scale, world)
    engine.initialise(stream.batch(0))
    trainer = PublicTrainer(settings, engine.crosscoder)
    public, ours = Timed([]), Timed([])
    for step in tqdm(range(training.num_steps), disable=None):
        raw_BMD = stream.batch(step)
        x_BMD = engine.crosscoder.scale(raw_BMD)
        last = step + 1 == training.num_steps
        public.run(partial(trainer.step, x_BMD))
        ours.run(partial(_our_step, engine, raw_BMD, last))
    _report_times(settings, public, ours)
    heldout = list(heldout_batches(pairs, training.num_tokens_per_step, settings.data.max_validation_tokens))
    _report("ours", engine.evaluate(heldout), ours.loss, engine.state().values["threshold"])
    trainer.model.copy_to(engine.crosscoder, trainer.threshold)
    _report("public", validation_metrics(engine.crosscoder, heldout), public.loss, trainer.threshold)


def _our_step(engine: Engine, raw_BMD: Tensor, measured: bool) -> float:
    return engine.step(raw_BMD, measured).get("train/loss", 0.0)


def _report_times(settings: TrainSettings, public: Timed, ours: Timed) -> None:
    slow, fast = public.seconds[WARM_UP:], ours.seconds[WARM_UP:]
    ratio = statistics.median(a / b for a, b in zip(slow, fast, strict=True))
    crosscoder, training = settings.crosscoder, settings.training
    print(machine())
    print(
        f"public recipe: B={training.num_tokens_per_step} L={crosscoder.num_latents} k={crosscoder.k}, "
        f"{training.num_steps} steps: public {statistics.median(slow):.3f} s a step, ours "
        f"{statistics.median(fast):.3f} s: {ratio:.1f} times faster (median of pairs), "
        f"{sum(slow) / sum(fast):.1f} times in all"
    )


def _report(name: str, metrics: dict[str, float], loss: float, threshold: float | None) -> None:
    values = ", ".join(f"{key.removeprefix('val/')} {value:.4f}" for key, value in metrics.items())
    print(f"{name}: last loss {loss:.4f}, threshold {threshold:.4f}, held out {values}")


if __name__ == "__main__":
    run(TrainSettings, main)
