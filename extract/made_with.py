"""What the shards of a folder are made with: `settings.json`, which its first worker writes and all others must share.

Workers may start at the same moment with different settings. So the file is made exclusively, looked at once more
before every shard, and the index of every activation shard keeps a digest of it: a folder never holds a mixture
that nobody noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.errors import BadInput
from extract.publish import publish, publish_first
from extract.remote import refuse_writing


def start_folder(folder: Path, settings: dict, others_at_work: bool = False) -> None:
    """Begin or continue a folder of shards: BadInput when it was begun with other settings.

    Settings that no shard was made with yet (a mistake that stopped the first attempt) are replaced, unless others are
    just making one.
    """
    refuse_writing(folder)
    path = folder / "settings.json"
    data = json.dumps(settings, indent=1).encode()
    if not path.exists():
        if publish_first(path, data):
            return
    elif not others_at_work and not any(folder.glob("shard-*.tar")):
        publish(path, data)
        return
    check_folder(folder, settings)


def check_folder(folder: Path, settings: dict) -> None:
    """BadInput unless `folder` is (still) the one of these settings."""
    changed = "; ".join(_differences(read_settings(folder / "settings.json"), json.loads(json.dumps(settings))))
    if changed:
        raise BadInput(
            f"{folder} was made with other settings ({changed}). Choose another store=PATH, or delete the folder "
            f"once no worker is at it."
        )


def read_settings(path: Path) -> dict:
    """What the shards beside `path` were made with; BadInput if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise BadInput(
            f"{path} is missing or damaged ({error}). python -m extract.verify ... repair=true makes it again from the "
            f"manifest; where there is none, delete the folder or choose another store=PATH."
        ) from error


def settings_sha256(settings: dict) -> str:
    """The digest of settings in an index. Equal for settings that `check_folder` takes for equal: neither order nor
    entries that are null count, so a later release may add a setting.
    """
    return hashlib.sha256(json.dumps(_without_nulls(settings), sort_keys=True).encode()).hexdigest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """One "name: before there, now now" per leaf that two JSON values do not share."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in list(dict.fromkeys([*before, *now])):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield f"{name}: {before!r} there, {now!r} now"
