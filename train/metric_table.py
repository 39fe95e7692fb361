"""Every quantity that a command logs, in metrics.jsonl and on W&B: its name, its unit and what it means.

A name is <section>/<quantity>, then what it is of: `val/variance_explained/<model>`. In a name <model> and <other>
stand for members of the pair, <pair> for the run that is analysed, <owner> for who a latent belongs to,
<comparison> for what the report calls a table of two tuned models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What the values of a metric are. A histogram is {"edges": [...], "counts": [...]}, with one edge more than counts;
# tables and pages are on W&B alone.
NUMBER, HISTOGRAM, TABLE, PAGE = "number", "histogram", "table", "page"
# When a training run logs a metric: every training.log_every steps, at validation, or with either if something else is
# so, which `about` says.
EVERY, VALIDATION = "log_every", "validation"


@dataclass(frozen=True)
class Metric:
    """One quantity. `best` is which of its values stands for a run: the last, or the largest or smallest."""

    name: str
    unit: str
    about: str
    kind: str = NUMBER
    when: str = EVERY
    conditional: bool = False
    best: str = "last"

    @property
    def section(self) -> str:
        return self.name.partition("/")[0]

    def matches(self, name: str) -> bool:
        """Whether `name`, as it was logged, is this quantity of some model, pair or owner."""
        parts = re.split(r"<\w+>", self.name)
        return re.fullmatch("[^/]+".join(map(re.escape, parts)), name) is not None


METRICS = (
    Metric("train/loss", "loss", "Loss of the step's batch, all terms.", best="min"),
    Metric("train/reconstruction", "loss", "Its reconstruction term."),
    Metric("train/auxk", "loss", "Its auxiliary term, which revives dead latents, weighted; 0 while none is dead."),
    Metric("train/delta", "loss", "Its term on the difference between models, weighted; 0 without one."),
    Metric("train/variance_explained/<model>", "share", "Variance of the batch's activations that is reconstructed."),
    Metric("train/l0", "latents per token", "Latents kept for a token of the batch, on average."),
    Metric(
        "train/threshold",
        "scaled code",
        "Threshold of codes at inference, from crosscoder.threshold_start_step on.",
        conditional=True,
    ),
    Metric("train/dead", "latents", "Latents that were silent for crosscoder.dead_after_tokens or more."),
    Metric("train/grad_norm", "norm", "Global norm of the gradient before it is clipped to training.max_grad_norm."),
    Metric("train/lr", "1", "Learning rate of the step."),
    Metric(
        "val/variance_explained/<model>",
        "share",
        "Variance of held-out activations that is reconstructed, with codes as at inference.",
        when=VALIDATION,
        best="max",
    ),
    Metric(
        "val/cross_entropy/<model>/clean",
        "nats per token",
        "Cross-entropy of the language model on held-out documents, as it is, with training.recovered_tokens.",
        when=VALIDATION,
        conditional=True,
        best="min",
    ),
    Metric(
        "val/cross_entropy/<model>/reconstructed",
        "nats per token",
        "The same with its activations replaced by the crosscoder's reconstruction.",
        when=VALIDATION,
        conditional=True,
        best="min",
    ),
    Metric(
        "val/cross_entropy/<model>/zero",
        "nats per token",
        "The same with zeros in place of its activations.",
        when=VALIDATION,
        conditional=True,
        best="min",
    ),
    Metric(
        "val/loss_recovered/<model>",
        "share",
        "(zero - reconstructed) / (zero - clean) of these: 1 = as good as its own activations, 0 = as bad as none.",
        when=VALIDATION,
        conditional=True,
        best="max",
    ),
    Metric("val/l0", "latents per token", "Latents above the threshold for a held-out token.", when=VALIDATION),
    Metric("val/silent", "latents", "Latents that fire on no held-out token.", when=VALIDATION),
    Metric(
        "val/dedicated_firing/<model>",
        "latents",
        "Latents dedicated to a model that fire on held-out tokens, if crosscoder.dedicated gives it any.",
        when=VALIDATION,
        conditional=True,
    ),
    Metric(
        "val/firing_frequency",
        "log10 of a share",
        "Over latents that fire on held-out tokens: log10 of the share of tokens on which each does.",
        HISTOGRAM,
        VALIDATION,
    ),
    Metric(
        "val/delta_norm/<model>_<other>",
        "relative norm",
        "Over latents: 0 where only <model> has a decoder row, 1 where only <other> has, 0.5 where they are equal.",
        HISTOGRAM,
        VALIDATION,
    ),
    Metric(
        "speed/tokens_per_second",
        "tokens/s",
        "Tokens trained on, all ranks together, since the last line; without validation.",
    ),
    Metric("speed/data_wait", "share", "Share of that time in which the step waited for data."),
    Metric(
        "speed/roofline",
        "share",
        "Time that the step needs at the GPUs' peak rates (python -m train.plan) over the time that it took; on GPUs "
        "whose rates are known.",
        conditional=True,
    ),
    Metric("memory/host_gb", "GB", "Resident memory of rank 0's process, mapped shards included, in 10^9 bytes."),
    Metric(
        "memory/gpu_peak_gb",
        "GB",
        "Most GPU memory that rank 0's tensors took since the start, in 10^9 bytes; on a GPU.",
        conditional=True,
    ),
    Metric("tokens/tokens", "tokens", "Tokens of the corpus that were made; the step of these lines."),
    Metric("tokens/documents", "documents", "Documents that they are of."),
    Metric("tokens/tokens_per_second", "tokens/s", "Tokens made a second since the last line."),
    Metric("extract/tokens", "tokens", "Tokens of finished shards, all models and hookpoints together."),
    Metric("extract/shards", "shards", "Finished shards, all models and hookpoints together; the step of these lines."),
    Metric("extract/tokens_per_second", "tokens/s", "Tokens finished in the last ten minutes, all workers together."),
    Metric("extract/claimed", "shards", "Shards that workers are at."),
    Metric("extract/done/<model>", "share", "Tokens of a model that are finished, at all its hookpoints."),
    Metric("analysis/latents/<pair>/<owner>", "latents", "Latents by owner: a model, shared, other or dead."),
    Metric("analysis/owners", "latents", "The same, a row for each pair and owner.", TABLE),
    Metric(
        "analysis/categories/<pair>",
        "latents",
        "Latents of one model: their category, its class, and how close it is.",
        TABLE,
    ),
    Metric("analysis/classes/<pair>", "latents", "How many model-specific latents fall into each class.", TABLE),
    Metric(
        "analysis/comparisons/<comparison>",
        "latents",
        "Of two tuned models of one base: how many latents each class or category has, in numbers and shares, and what "
        "the difference may be.",
        TABLE,
    ),
    Metric("analysis/report", "", "The report of the study.", PAGE),
)


def units(*sections: str) -> dict[str, str]:
    """The unit of each metric of some sections, by its name."""
    return {metric.name: metric.unit for metric in METRICS if metric.section in sections}


def best_values() -> dict[str, str]:
    """Which value stands for a run, where it is not the last, by the pattern (* is anything) of the metric's name."""
    return {re.sub("<.*", "*", metric.name): metric.best for metric in METRICS if metric.best != "last"}


def metric_of(name: str) -> Metric | None:
    """The row of the table that a logged name belongs to; None for `step` and for what is not in the table."""
    return next((metric for metric in METRICS if metric.matches(name)), None)
