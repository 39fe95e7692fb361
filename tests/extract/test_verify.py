"""A byte flipped anywhere is found and named; what is bad is made again, and nothing else."""

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

from extract import verify
from extract.activations import extract
from extract.command import compose
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.repair import repair
from extract.verify import folders_of, main, problems
from tests import tiny
from tests.extract.test_activations import run


def flip(path: Path, position: int, mask: int = 1) -> bytes:
    """Change one byte of a file; returns what it was before."""
    before = path.read_bytes()
    data = bytearray(before)
    data[position] ^= mask
    path.write_bytes(data)
    return before


def full(study: list[str]) -> ExtractSettings:
    return compose(ExtractSettings, [*study, "mode=full"])


def store_files(settings: ExtractSettings) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders_of(settings) for path in sorted(folder.iterdir())}


def test_a_byte_flipped_anywhere_is_named(study: list[str]):
    """Every kind of file of tokens and activations, random places and bits; fast sees all but the inside of shards."""
    fast, whole = run(study), full(study)
    assert not list(problems(fast)) and not list(problems(whole))
    rng = random.Random(1)
    for folder in folders_of(fast)[:2]:
        for name in ("shard-00001.tar", "shard-00002.index", "manifest.json", "settings.json"):
            path = folder / name
            for _ in range(12):
                before = flip(path, rng.randrange(path.stat().st_size), rng.randrange(1, 256))
                assert path in {problem.path for problem in problems(whole)}
                assert name.endswith(".tar") or path in {problem.path for problem in problems(fast)}
                path.write_bytes(before)
    assert not list(problems(whole))


def test_shards_are_looked_at_side_by_side_and_named_in_order(study: list[str], monkeypatch: pytest.MonkeyPatch):
    """No shard of a folder's four is looked at before all are at hand: one after the other, the first waits in vain."""
    settings = run(study)
    folder = settings.activations_folder("base", "block1")
    for number in (3, 0, 2):
        flip(folder / f"shard-0000{number}.tar", 700)
    real, all_four = verify._archive, threading.Barrier(4, timeout=20)
    monkeypatch.setattr(verify, "THREADS", 4)
    monkeypatch.setattr(verify, "_archive", lambda *arguments: (all_four.wait(), real(*arguments))[1])
    assert [problem.path.name for problem in problems(full(study))] == [f"shard-0000{i}.tar" for i in (0, 2, 3)]


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_the_bar_counts_every_byte_that_is_read(study: list[str], mode: str, monkeypatch: pytest.MonkeyPatch):
    settings = run(study)
    bars = []
    monkeypatch.setattr(verify, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    assert not list(problems(compose(ExtractSettings, [*study, f"mode={mode}"])))
    paths = [path for folder in folders_of(settings) for path in folder.glob("shard-*")]
    indexes, archives = (sum(p.stat().st_size for p in paths if p.suffix == suffix) for suffix in (".index", ".tar"))
    assert bars[0].n == bars[0].total == indexes + (2 * archives if mode == "full" else 0)


def test_sizes_and_missing_files_are_seen_fast(study: list[str]):
    settings = run(study)
    base, tuned = (settings.activations_folder(name, "block1") for name in ("base", "tuned"))
    (base / "shard-00001.tar").write_bytes((base / "shard-00001.tar").read_bytes()[:-1])
    (base / "shard-00002.tar").unlink()
    (tuned / "shard-00000.index").unlink()
    (tuned / "settings.json").unlink()
    found = [str(problem) for problem in problems(settings)]
    assert len(found) == 4 and "shard-00001.tar has " in found[0] and found[1].endswith("shard-00002.tar is missing.")
    assert found[2].endswith("settings.json is missing.") and found[3].endswith("shard-00000.index is missing.")


def test_activations_of_other_tokens_are_named(study: list[str]):
    """Sound files that do not belong together: the tokens were made anew with other documents."""
    settings = run(study)
    for path in settings.tokens_folder.iterdir():
        path.unlink()
    other = compose(ExtractSettings, [*study, "corpus.context_length=12", "mode=full"])
    from extract.tokens import make_tokens

    make_tokens(other)
    found = [str(problem) for problem in problems(other)]
    assert len(found) == 2 and all("made from other tokens" in line for line in found) and settings.store in found[0]


def test_repair_makes_bad_shards_again_and_only_those(study: list[str]):
    settings = run(study)
    before = store_files(settings)
    base, tuned = (settings.activations_folder(name, "block1") for name in ("base", "tuned"))
    untouched = {path: path.stat().st_mtime_ns for path in before if path.name == "shard-00000.tar"}
    flip(base / "shard-00001.tar", 700)
    flip(tuned / "shard-00002.index", 50)
    (tuned / "shard-00003.tar").unlink()
    flip(base / "settings.json", 20)
    lines = list(repair(full(study), list(problems(full(study)))))
    assert [line.split(" ")[0] for line in lines] == [
        f"{base / 'settings.json'},",
        str(base / "shard-00001.tar"),
        str(tuned / "shard-00002.tar"),
        str(tuned / "shard-00003.tar"),
    ]
    assert all("the same bytes as before" in line for line in lines[1:])
    after = store_files(settings)
    assert {p: d for p, d in after.items() if p.name != "manifest.json"} == {
        p: d for p, d in before.items() if p.name != "manifest.json"
    }
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert not list(problems(full(study)))


def test_repair_of_an_altered_manifest_looks_at_the_shards_too(study: list[str]):
    settings = run(study)
    folder = settings.activations_folder("base", "block1")
    content = Manifest.read(folder).content_sha256()
    flip(folder / "manifest.json", 300)
    flip(folder / "shard-00002.tar", 700)
    found = list(problems(full(study)))
    assert {problem.path.name for problem in found} == {"manifest.json", "shard-00002.tar"}
    assert [line.split("/")[-1].split(" ")[0] for line in repair(full(study), found)] == ["shard-00002.tar"]
    assert Manifest.read(folder).content_sha256() == content


def test_repair_takes_tokens_from_the_corpus_if_it_gives_the_same(study: list[str], corpus_file: Path):
    settings = run(study)
    before = store_files(settings)
    flip(settings.tokens_folder / "shard-00001.tar", 700)
    flip(settings.tokens_folder / "manifest.json", 300)  # the activations still say which tokens they were made from
    lines = list(repair(full(study), list(problems(full(study)))))
    assert len(lines) == 3 and not list(problems(full(study)))
    assert {path: data for path, data in store_files(settings).items() if path.name != "manifest.json"} == {
        path: data for path, data in before.items() if path.name != "manifest.json"
    }
    assert not (Path(settings.store) / "tokens.repair").exists()


def test_repair_refuses_tokens_of_a_corpus_that_changed(study: list[str], corpus_file: Path, tmp_path: Path):
    copy = tmp_path / "corpus.jsonl"
    copy.write_bytes(corpus_file.read_bytes())
    own = [argument for argument in study if not argument.startswith("corpus=")] + [f"corpus={copy}"]
    settings = run(own)
    flip(settings.tokens_folder / "shard-00001.tar", 700)
    damaged = store_files(settings)
    copy.write_text(copy.read_text().replace("word5x1", "other"))
    with pytest.raises(BadInput, match="the corpus gives other tokens now"):
        list(repair(full(own), list(problems(full(own)))))
    assert store_files(settings) == damaged


def test_repair_deletes_nothing_when_the_model_is_another(study: list[str], tmp_path: Path):
    settings = run(study)
    shard = settings.activations_folder("tuned", "block1") / "shard-00001.tar"
    flip(shard, 700)
    damaged = store_files(settings)
    other = full([*study, f"models.tuned={tiny.save_model(tmp_path / 'other', seed=9)}"])
    with pytest.raises(BadInput, match="was made with other settings"):
        list(repair(other, list(problems(other))))
    assert store_files(settings) == damaged


def test_the_command_names_repairs_and_says_so(study: list[str]):
    settings = run(study)
    shard = settings.activations_folder("base", "block1") / "shard-00001.tar"
    flip(shard, 700)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "extract.verify", *study, *arguments]
        return subprocess.run(line, capture_output=True, text=True)

    assert command().returncode == 0
    named = command("mode=full")
    assert named.returncode == 1 and f"bad: {shard} was altered" in named.stderr and "repair=true" in named.stdout
    repaired = command("mode=full", "repair=true")
    assert repaired.returncode == 0 and f"repaired: {shard} (the same bytes as before)" in repaired.stdout
    assert command("mode=full").returncode == 0


def test_an_unfinished_folder_is_a_problem(study: list[str]):
    settings = run(study)
    folder = settings.activations_folder("base", "block1")
    (folder / "manifest.json").unlink()
    assert [str(p) for p in problems(settings)] == [
        f"{folder / 'manifest.json'} is missing: the folder is not finished."
    ]
    extract(settings)
    assert not list(problems(settings))
    assert json.loads((folder / "manifest.json").read_bytes())["kind"] == "activations"


@pytest.mark.parametrize("repairing", ["false", "true"])
def test_a_remote_store_is_verified_where_it_was_made(study: list[str], repairing: str):
    remote = [*study, "store=https://example.org/store", f"repair={repairing}"]
    with pytest.raises(BadInput, match="https://example.org/store is remote"):
        main(compose(ExtractSettings, remote))
