"""The settings of comparisons, which `python -m analysis.compare counts=FILE` knows without a study."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from extract.errors import BadInput


@dataclass
class CompareConfig:
    """How category frequencies of tuned models are compared."""

    # Coverage of the intervals; a difference is claimed only if its q is below 1 minus this.
    confidence: float = 0.95
    # Random permutations behind the global test and the probability of chance, and bootstrap resamples.
    resamples: int = 10_000
    # Seed of the permutations and resamples.
    seed: int = 0
    # The tuned model that the others are compared with; null is the first of the study.
    reference: str | None = None
    # Whether every tuned model is compared with every other one, and not with the reference alone.
    every_pair: bool = False
    # Whether a category that people gave a latent in the dashboard takes the place of the annotator's.
    human_labels: bool = False
    # The probability with which the smallest detectable changes would be found.
    power: float = 0.8
    # Share of wrong labels for which it is said how often they undo a difference.
    label_error: float = 0.1
    # Rises, and falls, in the table of top changes.
    top_changes: int = 5
    # CSV of a leaderboard, category,model,elo[,elo_low,elo_high][,style_control][,taxonomy], to set changes beside.
    leaderboard: str | None = None
    # The category or class of the taxonomy that a category of the leaderboard is set beside, {category: name}.
    leaderboard_map: dict[str, str] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """The level of the tests, 1 - confidence without the noise of its last digits."""
        return round(1 - self.confidence, 12)


def check_compare(compare: CompareConfig, section: str = "analysis.compare.") -> None:
    """Raises BadInput for the first field that cannot be used."""
    for name in ("confidence", "power", "label_error"):
        if not 0 < getattr(compare, name) < 1:
            raise BadInput(f"{section}{name} ({getattr(compare, name)}) must lie between 0 and 1.")
    for name in ("resamples", "top_changes"):
        if getattr(compare, name) < 1:
            raise BadInput(f"{section}{name} ({getattr(compare, name)}) must be at least 1.")
    if compare.seed < 0:
        raise BadInput(f"{section}seed ({compare.seed}) must be at least 0.")
    if compare.power <= compare.alpha:
        raise BadInput(
            f"{section}power ({compare.power}) must exceed 1 - confidence ({compare.alpha}), which chance reaches."
        )
    if compare.every_pair and compare.reference is not None:
        raise BadInput(f"{section}reference ({compare.reference}) means nothing with every_pair=true. Leave one out.")
    if compare.leaderboard_map and not compare.leaderboard:
        raise BadInput(
            f"{section}leaderboard_map maps categories of a leaderboard. Give it: {section}leaderboard=FILE."
        )
    if compare.leaderboard and not Path(compare.leaderboard).is_file():
        raise BadInput(f"{section}leaderboard ({compare.leaderboard}) is not a file. Give a CSV, or null.")
