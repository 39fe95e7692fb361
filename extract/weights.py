"""Which weights a model has: the manifests of its activations say so, and work continues only with the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from extract import adapters
from extract.config import ModelConfig
from extract.errors import BadInput
from extract.models import model_folder
from extract.publish import publish

# What a sha256 was computed of, by path: [bytes, modification time in ns, sha256]. Weights of 18 GB take 15 s.
CACHE = "hashes.json"


def weights_of(name: str, config: ModelConfig, store: Path) -> dict:
    """The commit of a hub model, or the sha256 of every file that decides what a local one computes; the adapter's
    likewise. Hashes are kept in `<store>/hashes.json` and reused while size and modification time stay.
    """
    place = model_folder(name, config)
    folder = Path(place)
    found: dict = {"commit": None, "files": {}, "adapter": {}}
    if folder.is_dir():
        found["files"] = _hashes(_model_files(folder), store)
    else:
        found["commit"] = _commit(place, config.revision)
    if adapter := adapters.adapter_folder(name, config):
        found["adapter"] = _hashes([adapter / adapters.CONFIG, adapter / adapters.WEIGHTS], store)
    return found


def identity(name: str, config: ModelConfig, weights: dict) -> dict:
    """What decides the activations of a model: its settings, and the `weights` that `weights_of` found. Where folders
    lie is none of it: the hashes of their files stand for them, so that a store and its models may be moved. `d_model`
    only says beforehand what the weights decide.
    """
    own = {key: value for key, value in asdict(config).items() if key not in ("device_map", "d_model")}
    if weights["files"]:
        del own["id"]
    if config.adapter is not None and Path(config.adapter).is_dir():
        del own["adapter"]
    return {"name": name, **own, "weights": weights}


def differ(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two findings of `weights_of` are of different weights; False where they cannot be compared: one is empty,
    or of a hub model and the other of a folder.
    """
    common = [key for key in ("commit", "files") if some.get(key) and others.get(key)]
    return bool(common) and any(some.get(key) != others.get(key) for key in (*common, "adapter"))


def _model_files(folder: Path) -> list[Path]:
    """config.json and the weights, in the format that transformers prefers."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [folder / "config.json", *weights]


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The commit that `revision` stood for when config.json was fetched; its folder in the hub's cache is named so."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _hashes(files: list[Path], store: Path) -> dict[str, str]:
    known = _read_cache(store / CACHE)
    before = dict(known)
    for file in files:
        state = file.stat()
        key = str(file.resolve())
        if known.get(key, [])[:2] != [state.st_size, state.st_mtime_ns]:
            known[key] = [state.st_size, state.st_mtime_ns, _sha256(file)]
    if known != before:
        publish(store / CACHE, json.dumps(known, indent=1).encode())
    return {file.name: known[str(file.resolve())][2] for file in files}


def _read_cache(path: Path) -> dict[str, list]:
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}). Delete it; it is made again.") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
