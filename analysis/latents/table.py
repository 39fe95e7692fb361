"""`latents.parquet`: one row a latent, all that is known of it in numbers.

Shapes: L latents, M models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import Tensor

from analysis.config import OwnerConfig
from analysis.latents.activity import Activity, histogram_edges
from analysis.latents.columns import NORM, nu_column, pair_column
from analysis.latents.nulls import MEASURES
from analysis.latents.owners import delta_norm_tags, owners
from train.crosscoder import Crosscoder
from train.histograms import delta_norm


@dataclass(frozen=True)
class Scaling:
    """What weights and latent scaling say: decoder Gram matrix and both nu (L, M, M), [j, focus, other], intervals of
    nu (2, 2, L, M, M), [low and high, measure, j, focus, other].
    """

    gram_LMM: Tensor
    nu: tuple[np.ndarray, np.ndarray]
    intervals: np.ndarray

    @property
    def norms_LM(self) -> Tensor:
        return self.gram_LMM.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def delta_norm_LMM(self) -> np.ndarray:
        return delta_norm(self.norms_LM).numpy()


def owners_of(activity: Activity, scaling: Scaling, crosscoder: Crosscoder, owner: OwnerConfig) -> np.ndarray:
    """The owner (L,) of every latent, see `owners.owners`."""
    dedicated_owner_L = crosscoder.dedicated_owner.cpu().numpy()
    fired_L = activity.num_active > 0
    return owners(scaling.delta_norm_LMM, *scaling.nu, fired_L, dedicated_owner_L, crosscoder.models, owner)


def latent_table(
    activity: Activity,
    scaling: Scaling,
    crosscoder: Crosscoder,
    owner_L: np.ndarray,
    group_L: np.ndarray,
    owner: OwnerConfig,
) -> pa.Table:
    """The table; the edges of its histograms are in its metadata, `histogram_edges`."""
    models, norms_LM = crosscoder.models, scaling.norms_LM
    with np.errstate(invalid="ignore"):
        cosine_LMM = (scaling.gram_LMM / (norms_LM[:, :, None] * norms_LM[:, None, :])).numpy()
    pairwise = {"delta_norm": scaling.delta_norm_LMM, "decoder_cosine": cosine_LMM}
    columns = {
        "latent": np.arange(crosscoder.num_latents, dtype=np.int32),
        "owner": owner_L,
        "dedicated": crosscoder.dedicated_owner.cpu().numpy() >= 0,
        "group": group_L,
        **activity.columns(),
        **{f"{NORM}{model}": norms_LM[:, m].numpy() for m, model in enumerate(models)},
        **_pair_columns(pairwise, activity.num_active > 0, models, owner),
        **_nu_columns(scaling, models),
    }
    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    return table.replace_schema_metadata({"histogram_edges": histogram_edges()})


def _pair_columns(
    values: dict[str, np.ndarray], fired_L: np.ndarray, models: list[str], owner: OwnerConfig
) -> dict[str, np.ndarray]:
    """Columns of (base, tuned); with more models those of every ordered pair, `<name>_<a>_<b>`."""
    columns: dict[str, np.ndarray] = {}
    for a, b in ordered_pairs(len(models)) if len(models) > 2 else [(0, 1)]:
        names = models[a], models[b]
        columns |= {pair_column(name, models, *names): value_LMM[:, a, b] for name, value_LMM in values.items()}
        tags = delta_norm_tags(values["delta_norm"][:, a, b], fired_L, names, owner)
        columns[pair_column("delta_norm_tag", models, *names)] = tags
    return columns


def _nu_columns(scaling: Scaling, models: list[str]) -> dict[str, np.ndarray]:
    """nu with every model as focus, towards every other, and the ends of its interval."""
    columns: dict[str, np.ndarray] = {}
    for focus, other in ordered_pairs(len(models)):
        for measure, (name, nu_LMM) in enumerate(zip(MEASURES, scaling.nu, strict=True)):
            column = nu_column(name, models, models[focus], models[other])
            columns[column] = nu_LMM[:, focus, other]
            for end, ends_2LMM in zip(("low", "high"), scaling.intervals, strict=True):
                columns[f"{column}_{end}"] = ends_2LMM[measure, :, focus, other]
    return columns


def ordered_pairs(num_models: int) -> list[tuple[int, int]]:
    """(a, b) for all a != b."""
    return [(a, b) for a in range(num_models) for b in range(num_models) if a != b]
