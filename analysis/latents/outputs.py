"""What a finished pass becomes on disk: the table of latents, and the small tables beside it.

Shapes: L latents, M models, D width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from analysis.config import NOT_MODELS, AnalysisConfig, OwnerConfig
from analysis.latents.columns import members_of
from analysis.latents.duplicates import find_groups, groups_csv
from analysis.latents.intervals import nu_intervals
from analysis.latents.nulls import Null, null_rows, nulls_csv
from analysis.latents.one_pass import LatentPass
from analysis.latents.rules import rules_csv
from analysis.latents.scaling import nu
from analysis.latents.table import Scaling, latent_table, owners_of
from extract.publish import publish, publishing
from train.crosscoder import Crosscoder

LATENTS, MAXIMA = "latents.parquet", "document_maxima.parquet"
NULLS, RULES, GROUPS = "nulls.csv", "rules.csv", "groups.csv"


def write_outputs(
    folder: Path,
    done: LatentPass,
    crosscoder: Crosscoder,
    gram_LMM: Tensor,
    config: AnalysisConfig,
    share_dropped: float,
) -> None:
    """Everything but the examples. The table of latents comes last."""
    done.maxima.publish(folder / MAXIMA)
    total_LK = done.sums.total()
    nu_error, nu_recons = (values.numpy() for values in nu(total_LK, gram_LMM))
    scaling = Scaling(gram_LMM, (nu_error, nu_recons), nu_intervals(done.sums, gram_LMM, config.intervals).numpy())
    owner_L, fired_L = owners_of(done.activity, scaling, crosscoder, config.owner), done.activity.num_active > 0
    is_dedicated_L = crosscoder.dedicated_owner.cpu().numpy() >= 0
    by_rules = (scaling.delta_norm_LMM, scaling.nu, fired_L, owner_L, is_dedicated_L)
    rules = rules_csv(*by_rules, crosscoder.models, config.owner)
    publish(folder / RULES, rules.encode())
    W_dec_LMD = crosscoder.W_dec.detach().unflatten(1, (crosscoder.num_models, crosscoder.d_model))
    random_error, random_recons = done.directions.nu(total_LK, W_dec_LMD, gram_LMM)
    nulls = [
        Null("random_direction", (random_error.numpy(), random_recons.numpy())),
        shared_null(scaling, crosscoder, config.owner),
    ]
    publish(folder / NULLS, nulls_csv(null_rows(nulls, crosscoder.models, config.owner)).encode())
    group_L, groups = find_groups(owner_L, rows_by_owner(W_dec_LMD, owner_L, crosscoder), config.owner.duplicate_cosine)
    publish(folder / GROUPS, groups_csv(groups, folder / MAXIMA).encode())
    table = latent_table(done.activity, scaling, crosscoder, owner_L, group_L, config.owner)
    with publishing(folder / LATENTS) as file:
        about = {**table.schema.metadata, b"share_dropped": str(share_dropped).encode()}
        pq.write_table(table.replace_schema_metadata(about), file)


def shared_null(scaling: Scaling, crosscoder: Crosscoder, owner: OwnerConfig) -> Null:
    """nu of the latents, not dedicated, that Delta-norm calls shared between every pair of models."""
    upper = np.triu(np.ones((crosscoder.num_models,) * 2, dtype=bool), 1)
    delta_norm_LMM = scaling.delta_norm_LMM
    is_shared_LMM = (delta_norm_LMM >= owner.shared_low) & (delta_norm_LMM <= owner.shared_high)
    is_shared_L = (is_shared_LMM | ~upper).all(axis=(1, 2)) & (crosscoder.dedicated_owner.cpu().numpy() < 0)
    return Null("shared", (scaling.nu[0][is_shared_L], scaling.nu[1][is_shared_L]))


def rows_by_owner(W_dec_LMD: Tensor, owner_L: np.ndarray, crosscoder: Crosscoder) -> dict[str, Tensor]:
    """For every owner that is some models but not all: the decoder rows of these, side by side, of its latents."""
    models, rows = crosscoder.models, {}
    for owner in sorted(set(owner_L.tolist()) - set(NOT_MODELS)):
        members = torch.tensor([models.index(member) for member in members_of(owner, models)])
        latents = torch.from_numpy(np.flatnonzero(owner_L == owner))
        rows[owner] = W_dec_LMD[latents.to(W_dec_LMD.device)[:, None], members.to(W_dec_LMD.device)].flatten(1)
    return rows
