"""Shards copied to a disk of the node when they are first read: shared file systems are slow where many jobs read them.

A staged store is a remote one (`extract.remote`) that fills from the shared folder: every file is copied once for all
processes of a node, checked against the manifest's hash, and found again by later jobs, for its folder has the name of
its content. Nothing is staged ahead: a node copies what its ranks read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from extract.errors import BadInput
from extract.remote import mount, origin_of
from extract.stores import ActivationStore
from train.meeting import Place


def staged(stores: Sequence[ActivationStore], folder: str | None) -> list[ActivationStore]:
    """The same stores, read through `folder`; as they are where that is None.

    BadInput where the disk has less room than this node's part of an epoch takes.
    """
    if folder is None:
        return list(stores)
    Path(folder).mkdir(parents=True, exist_ok=True)
    copies = [mount(_url(store.folder), Path(folder)) for store in stores]
    _check_room(stores, copies, folder, Place.of(os.environ))
    return [ActivationStore(copy) for copy in copies]


def _url(folder: Path) -> str:
    return origin_of(folder) or folder.resolve().as_uri()


def _check_room(stores: Sequence[ActivationStore], copies: Sequence[Path], folder: str, place: Place) -> None:
    num_nodes = max(1, place.size // max(1, place.local_size))
    pairs = zip(stores, copies, strict=True)
    files = [(copy / entry.file, entry.bytes) for store, copy in pairs for entry in store.manifest.shards]
    needed = sum(size for _, size in files) / num_nodes - sum(size for path, size in files if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"data.staging={folder} has {free / 1e9:,.1f} GB free, and what this node reads in an epoch takes "
            f"{needed / 1e9:,.1f} GB more. Leave it out, choose a larger disk, or train on more nodes."
        )
