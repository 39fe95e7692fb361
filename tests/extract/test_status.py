"""The view of all workers, from files that say exactly what is done, claimed, dead and missing."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from extract.claims import Holder
from extract.command import compose
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.status import RATE_WINDOW_S, tokens_per_second, view
from tests.disks import small_disk
from tests.extract.test_activations import run


def test_the_view_counts_what_is_done_claimed_and_missing(study: list[str], capsys: pytest.CaptureFixture[str]):
    """Four shards of about 500 tokens; of the base model two are gone, of which one is claimed."""
    settings = run(study)
    text, complete = view(settings)
    assert complete and "100.0% of 3,812 tokens, complete." in text
    folder = settings.activations_folder("base", "block1")
    for name in ("manifest.json", "shard-00001.index", "shard-00003.tar"):
        (folder / name).unlink()
    claim(settings, "base/shard-00001", os.getpid(), Holder.here().host)
    claim(settings, "base/shard-00003", 1, "another-host", age_s=301)
    text, complete = view(settings)
    rows = [line.split() for line in text.splitlines()]
    assert rows[1][:5] == ["base", "block1", "2/4", "1", "1"] and rows[2][:5] == ["tuned", "block1", "4/4", "0", "0"]
    assert rows[5][:3] == ["base/shard-00001", Holder.here().host, str(os.getpid())] and rows[5][-2:] == ["at", "work"]
    assert rows[6][:3] == ["base/shard-00003", "another-host", "1"] and rows[6][-2:] == ["0:05:01", "dead"]
    assert not complete


def claim(settings: ExtractSettings, name: str, pid: int, host: str, age_s: float = 0) -> None:
    path = settings.claims_folder / f"{name}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(Holder(host, pid, time.time() - 60))))
    os.utime(path, (time.time() - age_s,) * 2)


def test_the_speed_is_that_of_the_last_minutes():
    """Older shards give the window its whole length; without them the first shard only starts the watch."""
    now = 10_000.0
    assert tokens_per_second([(now - 5000, 900), (now - 500, 300), (now - 1, 300)], now) == 600 / RATE_WINDOW_S
    assert tokens_per_second([(now - 100, 300), (now - 50, 300), (now, 300)], now) == 600 / 100
    assert tokens_per_second([(now - 5000, 900)], now) == 0 and tokens_per_second([], now) == 0


def test_the_exit_status_says_whether_the_store_is_complete(study: list[str], tmp_path: Path):
    settings = run(study)

    def status() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "extract.status", *study], capture_output=True, text=True)

    assert status().returncode == 0
    (settings.activations_folder("tuned", "block1") / "manifest.json").unlink()
    incomplete = status()
    assert incomplete.returncode == 1 and "manifests are being written" in incomplete.stdout
    (settings.tokens_folder / "manifest.json").unlink()
    unreadable = status()
    assert unreadable.returncode == 2 and unreadable.stderr.startswith("error: ")


def test_watching_ends_when_the_store_is_complete(study: list[str]):
    settings = run(study)
    manifest = settings.activations_folder("tuned", "block1") / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    command = [sys.executable, "-m", "extract.status", *study, "watch=true"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    first = watching.stdout.readline()  # clears the screen, then shows the head of the table
    manifest.write_bytes(content)
    rest = watching.stdout.read()
    assert first.startswith("\033[H\033[J") and watching.wait(60) == 0
    assert "manifests are being written" in rest and rest.rstrip().endswith("complete.")
    assert compose(ExtractSettings, [*study, "watch=true"]).watch


def test_who_may_not_write_sees_the_view_too(study: list[str], tmp_path: Path):
    settings = run(study)
    with small_disk(tmp_path / "disk", 4096) as disk:
        shutil.copytree(settings.store, disk / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        text, complete = view(compose(ExtractSettings, [*study, f"store={disk / 'store'}"]))
    assert complete and "100.0% of 3,812 tokens, complete." in text


def test_a_store_without_tokens_and_a_remote_one_are_refused(study: list[str]):
    with pytest.raises(BadInput, match="tokens has no manifest.json"):
        view(compose(ExtractSettings, study))
    with pytest.raises(BadInput, match="https://example.org/store is remote"):
        view(compose(ExtractSettings, [*study, "store=https://example.org/store"]))
