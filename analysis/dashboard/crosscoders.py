"""The analysed crosscoders of a study as the dashboard shows them: one row for each latent, read once per change.

Shapes: L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from analysis.annotate.annotations import Annotation, read_annotations
from analysis.config import NOT_MODELS
from analysis.human import HUMAN, RECORD, HumanLabel, read_labels, unused_labels
from analysis.latents.columns import Columns, members_of, models_of, nu_column, owners_in_order, read_columns
from analysis.scoring.scores import SCORED, SCORES, Score, read_scores
from analysis.taxonomy.categories import Placed, read_categories
from extract.errors import BadInput

LATENTS, EXAMPLES, ANNOTATIONS, CATEGORIES = (
    "latents.parquet",
    "examples.sqlite",
    "annotations.jsonl",
    "categories.csv",
)
NU = ("nu_error", "nu_reconstruction")
# A page asks for several parts at once; one of them reads, and the others wait for it.
READING = Lock()


@dataclass(frozen=True)
class Crosscoder:
    """One analysis folder. `nu` holds for each latent the worst value of its owner; see `own_nu`. `warning` says what
    labels by hand are there and not used, if any are.
    """

    folder: Path
    models: list[str]
    columns: Columns
    nu: Columns
    annotations: dict[int, Annotation]
    placed: dict[int, Placed]
    scores: list[Score]
    human: dict[int, HumanLabel]
    warning: str

    @property
    def name(self) -> str:
        return self.folder.name

    def label(self, latent: int) -> str:
        """The label by hand if there is one, else the annotator's, else nothing."""
        if latent in self.human and self.human[latent].label:
            return self.human[latent].label
        return self.annotations[latent].label if latent in self.annotations else ""

    def category(self, latent: int) -> str:
        """The same of the category."""
        if latent in self.human and self.human[latent].category:
            return self.human[latent].category
        return self.placed[latent].category if latent in self.placed else ""

    def text(self, latent: int) -> str:
        """Everything that was written about a latent."""
        parts = [self.label(latent), self.category(latent)]
        if latent in self.annotations:
            parts += [self.annotations[latent].label, self.annotations[latent].description]
        if latent in self.human:
            parts.append(self.human[latent].note)
        return "\n".join(parts).casefold()

    def owners(self) -> dict[str, int]:
        """How many latents each owner has: models and sets of them first."""
        names, counts = np.unique(self.columns["owner"], return_counts=True)
        found = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
        return {owner: found[owner] for owner in [*owners_in_order(found, self.models), *NOT_MODELS] if owner in found}


def folders_in(outputs: Path) -> list[Path]:
    """The analysis folders of a study; BadInput if nothing is analysed."""
    found = [path for path in sorted((outputs / "analysis").glob("*")) if (path / LATENTS).is_file()]
    found = [path for path in found if (path / EXAMPLES).is_file()]
    if not found:
        raise BadInput(
            f"Nothing is analysed in {outputs}. Run `python -m analysis experiment=STUDY` with the same outputs first."
        )
    return found


def load(folder: Path) -> Crosscoder:
    """An analysis folder as it is now; what did not change since the last call is not read again."""
    names = (LATENTS, EXAMPLES, ANNOTATIONS, CATEGORIES, SCORES, RECORD, HUMAN)
    stamps = tuple(path.stat().st_mtime_ns if (path := folder / name).exists() else 0 for name in names)
    with READING:
        return _load(folder, stamps[:-1], stamps[-1])


@lru_cache(maxsize=8)
def _load(folder: Path, stamps: tuple[int, ...], human_stamp: int) -> Crosscoder:
    return replace(_read(folder, stamps), human=read_labels(folder), warning=unused_labels(folder))


@lru_cache(maxsize=4)
def _read(folder: Path, stamps: tuple[int, ...]) -> Crosscoder:
    """Without the labels by hand, which change with every click."""
    models, columns = models_of(folder), read_columns(folder)
    nu = {name: own_nu(columns, models, name) for name in NU}
    described = read_annotations(folder) if (folder / ANNOTATIONS).exists() else []
    placed = read_categories(folder) if (folder / CATEGORIES).exists() else []
    scores = [score for score in read_scores(folder) if score.outcome == SCORED]
    by_latent = {row.latent: row for row in described}, {row.latent: row for row in placed}
    return Crosscoder(folder, models, columns, nu, *by_latent, scores, {}, "")


def own_nu(columns: Columns, models: Sequence[str], name: str) -> np.ndarray:
    """The nu (L,) that is farthest from zero with an owner as focus, towards any model that is none.

    Of a latent that no model owns, the model with the longest decoder row takes the owner's place.
    """
    names, inverse_L = np.unique(columns["owner"], return_inverse=True)
    owned = [[model in members_of(str(owner), models) for model in models] for owner in names]
    longest_L = np.argmax([np.nan_to_num(columns[f"norm_{model}"]) for model in models], axis=0)
    is_owned = np.array([any(row) and not all(row) for row in owned])[inverse_L]
    mine_LM = np.where(is_owned[:, None], np.array(owned)[inverse_L], longest_L[:, None] == np.arange(len(models)))
    worst_L = np.full(len(mine_LM), np.nan)
    for i, focus in enumerate(models):
        for j, other in enumerate(models):
            if i != j:
                value_L = columns[nu_column(name, models, focus, other)].astype(float)
                takes_L = mine_LM[:, i] & ~mine_LM[:, j] & ~(np.abs(value_L) <= np.abs(worst_L))
                worst_L = np.where(takes_L, value_L, worst_L)
    return worst_L
