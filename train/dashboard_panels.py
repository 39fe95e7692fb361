"""What the dashboards show: a panel for every metric, and what became of a sweep's runs against what they differ in.

W&B's workspace (`dashboard_workspace`) and the local page (`dashboard_page`) draw the same sections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from train.metric_table import METRICS, Metric, metric_of

# Sections of a dashboard and the metrics that they show, by the first part of their names; SWEEP has relations.
SWEEP = "Sweep"
SECTIONS: dict[str, tuple[str, ...]] = {
    "Training": ("train",),
    "Training: held-out tokens": ("val",),
    "Training: speed and memory": ("speed", "memory"),
    SWEEP: (),
    "Tokens": ("tokens",),
    "Extraction": ("extract",),
    "Analysis": ("analysis",),
}
# Metrics that fall or vary by factors.
LOGARITHMIC = ("train/loss", "train/reconstruction", "train/grad_norm")
# How a part of a name is spelt in a title, where not as it stands.
SPELLING = {"l0": "L0", "lr": "learning rate", "auxk": "AuxK", "grad": "gradient", "gpu": "GPU", "gb": "memory"}


@dataclass(frozen=True)
class Panel:
    """A metric against the step."""

    metric: Metric

    @property
    def title(self) -> str:
        return title_of(self.metric.name)

    @property
    def title_with_unit(self) -> str:
        unit = self.metric.unit
        return self.title if unit in ("", "1", self.title) else f"{self.title} ({unit})"

    @property
    def x_title(self) -> str:
        return {"tokens": "tokens", "extract": "finished shards"}.get(self.metric.section, "step")

    @property
    def y_title(self) -> str:
        """The unit; what it is itself where it has none."""
        return self.title if self.metric.unit == "1" else self.metric.unit

    @property
    def is_logarithmic(self) -> bool:
        return self.metric.name in LOGARITHMIC


@dataclass(frozen=True)
class Relation:
    """The metric `y` of runs, a point a run, against `x`, a metric or the dotted name of a setting."""

    x: str
    y: str

    @property
    def title(self) -> str:
        return f"{title_of(self.y)} against {self.x_title}"

    @property
    def x_title(self) -> str:
        return title_of(self.x) if "/" in self.x else self.x.rpartition(".")[2]

    @property
    def unit(self) -> str:
        return row_of(self.y).unit


_EXPLAINED = "val/variance_explained/<model>"
RELATIONS = (
    Relation("val/l0", _EXPLAINED),
    Relation("crosscoder.k", _EXPLAINED),
    Relation("hookpoint", _EXPLAINED),
    Relation("crosscoder.num_latents", _EXPLAINED),
    Relation("training.lr", _EXPLAINED),
    Relation("val/l0", "val/loss_recovered/<model>"),
    Relation("val/l0", "val/silent"),
    Relation("crosscoder.num_latents", "val/silent"),
)


def panels_of(section: str) -> list[Panel]:
    """The panels of a section that show a metric each, in the order of METRICS."""
    return [Panel(metric) for metric in METRICS if metric.section in SECTIONS[section]]


def row_of(name: str) -> Metric:
    """The row of METRICS that a name with or without placeholders is of."""
    metric = metric_of(name)
    assert metric is not None, f"{name} is not a metric"
    return metric


def title_of(name: str) -> str:
    """ "val/cross_entropy/<model>/clean" -> "cross entropy, clean"."""
    parts = [part for part in name.split("/")[1:] if "<" not in part]
    return ", ".join(" ".join(SPELLING.get(word, word) for word in part.split("_")) for part in parts)


def part_of(name: str, pattern: str) -> str | None:
    """What a logged name has in place of a row's placeholders, "" where the row has none; None for other rows' names.

    ("val/x/base", "val/x/<model>") -> "base"
    """
    found = re.fullmatch(regex_of(pattern), name)
    return None if found is None else " ".join(found.groups())


def regex_of(pattern: str) -> str:
    """What all names of a row match, with a group for each placeholder."""
    return "([^/]+)".join(map(re.escape, re.split(r"<\w+>", pattern)))
