"""Claims by real files and real processes; other hosts are stood in for by claims that name another host."""

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from extract import claims as claims_module
from extract.claims import NAMELESS_S, Claims, Holder, clock, in_turn, look


def elsewhere(path: Path, age_s: float, holder: Holder | None = None) -> None:
    """The claim of a worker, on another host by default, touched `age_s` ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder or Holder("another-host", 1, time.time() - 1000))))
    os.utime(path, (time.time() - age_s,) * 2)


def test_one_of_many_gets_the_work_and_releasing_gives_it_back(tmp_path: Path):
    with Claims(tmp_path, 60) as first, Claims(tmp_path, 60) as second:
        claim = first.take("base/shard-00000")
        assert claim and not claim.taken_over and second.take("base/shard-00000") is None
        assert second.take("base/shard-00001")
        first.release(claim)
        assert second.take("base/shard-00000")
    assert not list(tmp_path.rglob("*.claim*"))  # leaving the block gives everything back


@pytest.mark.parametrize(("age_s", "dead"), [(50, False), (70, True)])
def test_a_claim_of_another_host_dies_with_its_heartbeat(tmp_path: Path, age_s: float, dead: bool):
    elsewhere(tmp_path / "shard.claim", age_s)
    with Claims(tmp_path, 60) as claims:
        claim = claims.take("shard")
        assert (claim is not None) == dead
        assert claim is None or (claim.taken_over and claim.is_held())


def dead_holder() -> Holder:
    """A process of this host that has ended."""
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    return replace(Holder.here(), pid=process.pid)


def test_a_claim_of_a_dead_process_of_this_host_is_taken_at_once(tmp_path: Path):
    elsewhere(tmp_path / "dead.claim", 0, dead_holder())
    elsewhere(tmp_path / "alive.claim", 0, replace(Holder.here(), pid=os.getppid()))
    with Claims(tmp_path, 60) as claims:
        assert claims.take("dead") and claims.take("alive") is None


@pytest.mark.parametrize("other", [{"host": "other"}, {"boot": "another boot"}, {"namespace": 1}])
def test_numbers_of_processes_mean_nothing_beyond_host_boot_and_namespace(tmp_path: Path, other: dict):
    """Containers may share a host's name and count their own processes: theirs time out like those of other hosts."""
    elsewhere(tmp_path / "shard.claim", 50, replace(dead_holder(), **other))
    with Claims(tmp_path, 60) as claims:
        assert claims.take("shard") is None
        elsewhere(tmp_path / "shard.claim", 70, replace(dead_holder(), **other))
        assert claims.take("shard")


def test_a_claim_of_an_earlier_release_is_read(tmp_path: Path):
    (tmp_path / "shard.claim").write_text(json.dumps({"host": "a", "pid": 1, "since": 2.5}))
    seen = look(tmp_path / "shard.claim")
    assert seen and seen.holder == Holder("a", 1, 2.5) and not seen.holder.is_gone()


def test_a_pass_over_the_claims_of_others_reads_the_clock_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(50):
        elsewhere(tmp_path / f"{i}.claim", 10)
    read: list[Path] = []
    monkeypatch.setattr(claims_module, "clock", lambda folder: read.append(folder) or clock(folder))
    with Claims(tmp_path, 60) as claims:
        assert not any(claims.take(str(i)) for i in range(50))
    assert len(read) == 1


def test_only_the_living_are_at_work(tmp_path: Path):
    with Claims(tmp_path, 60) as claims:
        assert not claims.others_at_work("base")
        elsewhere(tmp_path / "base/dead.claim", 70)
        elsewhere(tmp_path / "tuned/living.claim", 10)
        assert not claims.others_at_work("base") and claims.others_at_work("tuned")


@pytest.mark.parametrize("content", ["", "{", '{"host": "a"}', "[1]", "\0\0\0"])
def test_a_claim_whose_maker_died_before_writing_its_name_times_out(tmp_path: Path, content: str):
    (tmp_path / "shard.claim").write_text(content)
    with Claims(tmp_path, 60) as claims:
        assert claims.take("shard") is None
        os.utime(tmp_path / "shard.claim", (time.time() - NAMELESS_S - 1,) * 2)
        assert claims.take("shard")


def test_of_many_that_find_a_dead_claim_exactly_one_takes_it(tmp_path: Path):
    with ThreadPoolExecutor(8) as threads:
        for i in range(100):
            elsewhere(tmp_path / f"{i}.claim", 70)
            barrier = threading.Barrier(8)

            def take(name: str = str(i), barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return Claims(tmp_path, 60).take(name) is not None

            assert sum(threads.map(lambda _, take=take: take(), range(8))) == 1
    assert len(list(tmp_path.iterdir())) == 100  # nothing is left beside the claims


def test_a_taker_that_died_on_the_way_does_not_block_the_next(tmp_path: Path):
    path, lock = tmp_path / "shard.claim", tmp_path / "shard.claim.taker"
    elsewhere(path, 70)
    lock.touch()
    with Claims(tmp_path, 60) as claims:
        assert claims.take("shard") is None and lock.exists()  # somebody may be at it
        os.utime(lock, (time.time() - NAMELESS_S - 1,) * 2)
        assert claims.take("shard") is None and not lock.exists()
        claim = claims.take("shard")
        assert claim and claim.is_held() and list(tmp_path.iterdir()) == [path]


def test_claims_of_the_dead_are_cleared_and_of_the_living_kept(tmp_path: Path):
    elsewhere(tmp_path / "base/dead.claim", 70)
    elsewhere(tmp_path / "base/living.claim", 10)
    with Claims(tmp_path, 60) as claims:
        claims.clear("base")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["living.claim"]


def test_the_heartbeat_keeps_a_claim_alive_but_not_that_of_a_successor(tmp_path: Path):
    path = tmp_path / "shard.claim"
    with Claims(tmp_path, 0.5) as claims:
        claim = claims.take("shard")
        assert claim
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert clock(tmp_path) - path.stat().st_mtime < 10
        path.unlink()
        elsewhere(path, 1000)
        before = path.stat().st_mtime
        time.sleep(0.5)
        assert path.stat().st_mtime == before and not claim.is_held()
    assert path.exists()  # what a successor holds is not released


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, 0),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 4),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 6),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "6"}, 4),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_MIN": "0",
                "RANK": "1",
                "WORLD_SIZE": "2",
            },
            6,
        ),
    ],
)
def test_workers_begin_at_different_shards(environment: dict[str, str], first: int):
    """Eight shards: worker w of W at 8 w / W; array task a of A with p of P processes at 8 (a + p / P) / A."""
    order = in_turn(range(8), environment)
    assert order[0] == first and sorted(order) == list(range(8)) and order == [(first + i) % 8 for i in range(8)]
