"""Several real processes on one store: killed, restarted with another count, out of space."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from extract import archive
from extract import tokens as tokens_module
from extract.activations import ModelShards, check_spread, extract, worker_device
from extract.batches import compute_shard
from extract.claims import Claims, Holder
from extract.command import compose
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.models import load_blocks
from extract.tokens import make_tokens
from extract.verify import problems
from tests.disks import small_disk

# Workers are forked from a server that has imported everything once: real processes that start in milliseconds.
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["extract.activations", "transformers.models.llama.modeling_llama"])


def work(settings: ExtractSettings) -> None:
    torch.set_num_threads(1)
    extract(settings)


def start(settings: ExtractSettings, count: int) -> list:
    processes = [WORKERS.Process(target=work, args=(settings,)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def join(processes: list) -> None:
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def files(settings: ExtractSettings) -> dict[str, bytes]:
    """Everything below activations/ but manifests, of which the provenance may differ, and those without it."""
    root = Path(settings.store) / "activations"
    paths = [path for path in root.rglob("*") if path.is_file()]
    content = {str(path.relative_to(root)): path.read_bytes() for path in paths if path.name != "manifest.json"}
    manifests = {path.parent for path in paths if path.name == "manifest.json"}
    return content | {
        f"{folder.relative_to(root)}": Manifest.read(folder).content_sha256().encode() for folder in manifests
    }


def num_finished(settings: ExtractSettings) -> int:
    return len(list(Path(settings.store).glob("activations/*/*/*.index")))


@pytest.fixture
def many_shards(study: list[str]) -> list[str]:
    """About twenty shards for each of two models, two hookpoints in one pass."""
    return [*study, "corpus.tokens_per_shard=80", "hookpoints=[block0,block1]"]


def in_store(overrides: list[str], store: Path) -> ExtractSettings:
    return compose(ExtractSettings, [*overrides, f"store={store}"])


@pytest.mark.slow
def test_killed_workers_leave_a_store_that_any_number_finishes_to_the_same_bytes(
    many_shards: list[str], tmp_path: Path
):
    """kill -9 of two workers at a random moment, ten times; then one worker, or three, do the rest."""
    whole = in_store(many_shards, tmp_path / "whole")
    tokens = make_tokens(whole).folder
    join(start(whole, 1))
    expected = files(whole)
    total = sum(name.endswith(".index") for name in expected)
    moments = random.Random(0)
    for trial in range(10):
        settings = in_store(many_shards, tmp_path / str(trial))
        shutil.copytree(tokens, settings.tokens_folder)
        processes, enough = start(settings, 2), moments.randint(1, total // 2)
        while num_finished(settings) < enough and all(process.is_alive() for process in processes):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))  # anywhere in the making of the next shards
        for process in processes:
            process.kill()
            process.join()
        assert enough <= num_finished(settings) < total
        join(start(settings, (1, 3)[trial % 2]))
        assert files(settings) == expected
        assert not list(settings.claims_folder.rglob("*.claim*"))


def test_a_killed_workers_shards_are_taken_over_by_one_that_waits(many_shards: list[str], tmp_path: Path):
    """The claim of a dead worker of another host ages while the survivor works; then its shard is done as well."""
    settings = in_store([*many_shards, "activations.claim_timeout_s=2"], tmp_path / "store")
    make_tokens(settings)
    claim = settings.claims_folder / "base/shard-00003.claim"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps(asdict(Holder("another-host", 1, time.time()))))
    partial = settings.activations_folder("base", "block0") / "shard-00003.tar.0123.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"half a shard")
    extract(settings)
    assert not list(problems(settings)) and not claim.exists() and not partial.exists()


def test_without_waiting_a_worker_leaves_what_others_hold(
    many_shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = in_store([*many_shards, "activations.wait=false"], tmp_path / "store")
    make_tokens(settings)
    claim = settings.claims_folder / "base/shard-00003.claim"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps(asdict(Holder("another-host", 1, time.time()))))
    extract(settings)
    assert "activations: base lacks 1 shards, which other workers are at" in capsys.readouterr().out
    folder = settings.activations_folder("base", "block0")
    assert not (folder / "shard-00003.tar").exists() and (folder / "shard-00004.index").exists()
    assert not (folder / "manifest.json").exists()
    claim.unlink()
    extract(settings)
    assert not list(problems(settings))


def test_workers_share_the_shards(many_shards: list[str], tmp_path: Path):
    """Of three workers on one store, each shard is computed by one: all that they computed adds up to the store."""
    settings = in_store(many_shards, tmp_path / "store")
    tokens = make_tokens(settings)
    command = [sys.executable, "-m", "extract.activations", *many_shards, f"store={settings.store}"]
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"} for rank in range(3)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for environment in environments
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs
    computed = [
        int(line.split("computed ")[1].split(" tokens")[0].replace(",", ""))
        for output, _ in outputs
        for line in output.splitlines()
        if "this worker computed" in line
    ]
    assert sum(computed) == 2 * tokens.num_tokens
    assert not list(problems(settings))


def run_command(overrides: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "extract.activations", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_full_disk_stops_with_one_line_and_loses_nothing(many_shards: list[str], tmp_path: Path):
    """Room for the tokens and about half of the activations; after making room the same command goes on."""
    whole = in_store(many_shards, tmp_path / "whole")
    tokens = make_tokens(whole).folder
    extract(whole)
    expected = files(whole)
    room = sum(path.stat().st_size + 4096 for path in tokens.iterdir()) + sum(map(len, expected.values())) // 2
    with small_disk(tmp_path / "disk", room // 1024) as disk:
        settings = in_store(many_shards, disk / "store")
        shutil.copytree(tokens, settings.tokens_folder)
        done = run_command([*many_shards, f"store={settings.store}"])
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "No space left on device" in done.stderr and "shard-" in done.stderr
        there = files(settings)
        indexes = [name for name in there if name.endswith(".index")]
        assert 0 < len(indexes) < len(expected) // 2
        assert all(expected[name] == content for name, content in there.items())  # whole shards, nothing half
        assert not list(settings.claims_folder.rglob("*.claim"))
        subprocess.run(["mount", "-o", f"remount,size={4 * room // 1024}k", str(disk)], check=True)
        assert run_command([*many_shards, f"store={settings.store}"]).returncode == 0
        assert files(settings) == expected


def test_of_several_at_once_one_makes_the_tokens_and_the_others_wait(
    study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Held by another process, then ready: nothing is made, nor is what that process has open removed."""
    monkeypatch.setattr(tokens_module, "POLL_S", 0.01)
    ready = make_tokens(compose(ExtractSettings, [*study, "store=${outputs}/ready"])).folder
    settings = compose(ExtractSettings, study)
    capsys.readouterr()
    with Claims(settings.claims_folder, 60) as claims, ThreadPoolExecutor(1) as thread:
        claim = claims.take("tokens")
        assert claim
        waiting = thread.submit(make_tokens, settings)
        deadline = time.monotonic() + 60
        while "another process makes" not in capsys.readouterr().out and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not waiting.done() and not settings.tokens_folder.exists()
        shutil.copytree(ready, tmp_path / "copy")
        (tmp_path / "copy/shard-00000.tar.0123.partial").touch()
        (tmp_path / "copy").rename(settings.tokens_folder)
        assert waiting.result(60).num_documents == 40 and claim.is_held()
        assert (settings.tokens_folder / "shard-00000.tar.0123.partial").exists()
    assert not list(settings.claims_folder.iterdir())


def test_tokens_whose_maker_died_are_taken_over(study: list[str]):
    process = subprocess.Popen(["true"])
    process.wait()
    settings = compose(ExtractSettings, study)
    settings.claims_folder.mkdir(parents=True)
    claim = settings.claims_folder / "tokens.claim"
    claim.write_text(json.dumps(asdict(replace(Holder.here(), pid=process.pid))))
    assert make_tokens(settings).num_documents == 40 and not claim.exists()


def test_a_store_that_cannot_be_written_is_one_line(many_shards: list[str], tmp_path: Path):
    tokens = make_tokens(in_store(many_shards, tmp_path / "whole")).folder
    with small_disk(tmp_path / "disk", 4096) as disk:
        shutil.copytree(tokens, disk / "store/tokens")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = run_command([*many_shards, f"store={disk / 'store'}"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Read-only file system" in done.stderr and str(disk / "store") in done.stderr


def test_a_file_in_the_way_is_one_line(many_shards: list[str], tmp_path: Path):
    settings = in_store(many_shards, tmp_path / "store")
    make_tokens(settings)
    (tmp_path / "store/activations").touch()
    done = run_command([*many_shards, f"store={settings.store}"])
    assert done.returncode == 2 and "Not a directory" in done.stderr and "Traceback" not in done.stderr


def test_a_worker_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert worker_device("auto", {"LOCAL_RANK": "2"}) == torch.device("cuda:2")
    assert worker_device("auto", {"SLURM_LOCALID": "5"}) == torch.device("cuda:1")
    assert worker_device("cpu", {"LOCAL_RANK": "2"}) == torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=2"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, "SLURM_NTASKS_PER_NODE=4"),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "2"}, None),  # each task sees GPUs of its own
        ({"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "8"}, None),
        ({}, None),
    ],
)
def test_a_spread_model_takes_a_node_for_itself(study: list[str], environment: dict[str, str], refused: str | None):
    check_spread(compose(ExtractSettings, study), {"LOCAL_WORLD_SIZE": "8"})  # only who spreads a model is refused
    settings = compose(ExtractSettings, [*study, "models.tuned.device_map=auto"])
    with pytest.raises(BadInput, match=f"models.tuned.device_map=auto .*{refused}") if refused else nullcontext():
        check_spread(settings, environment)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_worker_that_was_thought_dead_goes_on(
    many_shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lost: bool
):
    """Whoever takes a claim over removes what its holder was writing; a file that vanishes otherwise is an error."""
    settings = in_store(many_shards, tmp_path / "store")
    shards = ModelShards(settings, make_tokens(settings), "base")
    with Claims(settings.claims_folder, 60) as claims:
        shards.start(claims)
    model = load_blocks("base", settings.models["base"], settings.hookpoints)
    documents = [shards.tokens.document(i).token_ids for i in shards.documents[0]]

    def taken_over(partial: Path, path: Path) -> None:
        if is_lost:
            (settings.claims_folder / "base/shard-00000.claim").unlink()
        partial.unlink()
        partial.replace(path)

    with Claims(settings.claims_folder, 60) as claims:
        claim = claims.take("base/shard-00000")
        assert claim
        monkeypatch.setattr(archive, "rename", taken_over)
        with nullcontext() if is_lost else pytest.raises(FileNotFoundError):
            shards._write(claims, claim, 0, compute_shard(model, documents, 256, lambda tokens: None))
    assert not num_finished(settings)
