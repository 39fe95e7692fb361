"""Near-duplicates: latents of one owner whose decoder rows point the same way, and whether they fire together.

Two latents are joined if the cosine of their decoder rows (of the owner's models, side by side) exceeds a limit; a
group is a connected component. Members that fire on the same documents say one thing twice; members that fire on
different ones split a direction between them.

Shapes: n latents of one owner, c of a chunk, W = width of their rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from analysis.examples.maxima import read_documents_of

# Values of one product (64 MB in float32): so many latents are compared with all others at a time.
CHUNK_VALUES = 2**24
NO_PLACES = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Group:
    """Near-duplicates of one owner, at least two, and the cosines of the pairs that joined them."""

    owner: str
    latents: list[int]
    cosine_min: float
    cosine_max: float


def find_groups(owner_L: np.ndarray, rows: Mapping[str, Tensor], limit: float) -> tuple[np.ndarray, list[Group]]:
    """The group (L,) int32 of every latent, the smallest number among its members, its own if it is alone; and the
    groups of more than one. `rows` (n, W) are the decoder rows to compare of each owner that counts.
    """
    group_L = np.arange(len(owner_L), dtype=np.int32)
    groups = []
    for owner, rows_nW in rows.items():
        latent_n = np.flatnonzero(owner_L == owner)
        first_p, second_p, cosine_p = similar(rows_nW, limit)
        graph = coo_array((np.ones(len(first_p)), (first_p, second_p)), shape=(len(latent_n), len(latent_n)))
        _, component_n = connected_components(graph, directed=False)
        _, smallest_n = np.unique(component_n, return_index=True)
        group_L[latent_n] = latent_n[smallest_n][component_n]
        for number in np.unique(component_n[first_p]):
            members, cosines = latent_n[component_n == number], cosine_p[component_n[first_p] == number]
            groups.append(Group(owner, members.tolist(), float(cosines.min()), float(cosines.max())))
    return group_L, sorted(groups, key=lambda group: group.latents)


def similar(rows_nW: Tensor, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs (first < second) of rows whose cosine exceeds `limit`, and the cosines; no (n, n) matrix exists."""
    unit_nW = torch.nn.functional.normalize(rows_nW.float(), dim=1)
    firsts, seconds, cosines = [NO_PLACES], [NO_PLACES], [np.empty(0, dtype=np.float32)]
    size = max(1, CHUNK_VALUES // max(1, len(unit_nW)))
    for start in range(0, len(unit_nW), size):
        cosine_cn = unit_nW[start : start + size] @ unit_nW[start:].T
        first_p, second_p = torch.triu(cosine_cn > limit, 1).nonzero(as_tuple=True)
        firsts.append((first_p + start).cpu().numpy())
        seconds.append((second_p + start).cpu().numpy())
        cosines.append(cosine_cn[first_p, second_p].cpu().numpy())
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(cosines)


def groups_csv(groups: list[Group], maxima: Path) -> str:
    """`groups.csv`; of groups whose latents are in the document `maxima`, also in how many documents any member fires,
    and in how many at least two do.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heading = ["group", "owner", "size", "latents", "cosine_min", "cosine_max", "num_documents", "shared_documents"]
    writer.writerow(heading)
    for group in groups:
        _, count = np.unique(read_documents_of(maxima, group.latents), return_counts=True)
        documents = [len(count), int((count > 1).sum())] if len(count) else ["", ""]
        cosines = [f"{group.cosine_min:.6g}", f"{group.cosine_max:.6g}"]
        latents = " ".join(map(str, group.latents))
        writer.writerow([group.latents[0], group.owner, len(group.latents), latents, *cosines, *documents])
    return text.getvalue()
