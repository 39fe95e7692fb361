"""What ranks decide together, on real processes; who has which device; which numbers of ranks can share the work."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from planted import settings_of
from pool import pool_of

from extract.errors import BadInput
from train.config import EngineConfig
from train.division import check_ranks
from train.meeting import ALONE, Place
from train.world import World, check_engine, device_of


def from_main(world):
    return world.from_main({"rank": world.everyone.rank}), world.from_main([1.5, None])


def voting(world):
    return [world.vote(word)() for word in (0, world.everyone.rank, 2 * (world.everyone.rank == 1))]


def votes_ahead(world):
    """Two votes under way at a time; the second rank comes late."""
    first = world.vote(world.everyone.rank)
    time.sleep(0.1 * world.everyone.rank)
    second = world.vote(10 - world.everyone.rank)
    return first(), second()


def making_first(world, folder):
    with world.main_first():
        time.sleep(0.3 if world.is_main else 0)
        found = (folder / "made").exists()
        (folder / "made").touch()
    return found


def splitting(world, size):
    within, across = world.split(size)
    rank = torch.tensor([float(world.everyone.rank)])
    gathered = [group.gather(rank, "ranks").tolist() for group in (within, across)]
    return within.rank, within.size, across.rank, across.size, *gathered, world.split(size) == (within, across)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_rank_0_has_all_get(num_ranks):
    assert pool_of(num_ranks).run(from_main) == [({"rank": 0}, [1.5, None])] * num_ranks


def test_a_vote_is_the_largest_word(num_ranks=4):
    assert pool_of(num_ranks).run(voting) == [[0, num_ranks - 1, 2]] * num_ranks
    assert pool_of(2).run(votes_ahead) == [(1, 10)] * 2


def test_rank_0_goes_first(tmp_path):
    assert pool_of(4).run(making_first, tmp_path) == [False, True, True, True]


def test_ranks_are_split_into_neighbours_and_those_in_the_same_place():
    found = pool_of(4).run(splitting, 2)
    assert found == [
        (r % 2, 2, r // 2, 2, [r // 2 * 2.0, r // 2 * 2 + 1.0], [r % 2 + 0.0, r % 2 + 2.0], True) for r in range(4)
    ]
    everyone = [0.0, 1.0, 2.0, 3.0]
    assert pool_of(4).run(splitting, 4) == [(r, 4, 0, 1, everyone, [float(r)], True) for r in range(4)]
    assert pool_of(4).run(splitting, 1) == [(0, 1, r, 4, [float(r)], everyone, True) for r in range(4)]


def timeouts(world):
    """Of all groups, in seconds, with one that a library made."""
    within, across = world.split(2)
    foreign = dist.new_group()
    world.limit(foreign)
    groups = dist.group.WORLD, world._voters, within.process_group, across.process_group, foreign
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_no_group_gives_up_before_the_watchdog():
    assert EngineConfig().timeout_s == 600
    assert pool_of(4).run(timeouts) == [[1260.0] * 5] * 4


def refused_split(world):
    with pytest.raises(BadInput) as refused:
        world.split(3)
    return str(refused.value)


def test_a_split_that_does_not_divide_the_ranks_is_refused():
    assert (
        pool_of(4).run(refused_split) == ["engine.ranks_per_copy=3 does not divide the 4 ranks. Nearest: 2 or 4."] * 4
    )


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for world in (World.alone(), World.alone("cpu")):
        world.step = 3
        assert (world.everyone.rank, world.everyone.size, world.is_main, world.step) == (0, 1, True, 3)
        assert from_main(world) == ({"rank": 0}, [1.5, None]) and world.vote(2)() == 2
        with world.main_first():
            assert world.split(1)[0].size == 1
    with World.open(EngineConfig(), "cpu") as world:
        assert world.everyone.size == 1 and not torch.distributed.is_initialized()
    with World.open(EngineConfig(name="fsdp"), "cpu") as world:
        assert world.everyone.size == 1 and torch.distributed.get_world_size() == 1
    assert not torch.distributed.is_initialized()


def test_what_a_launcher_says():
    assert Place.of({}) == ALONE == Place.of({"LOCAL_RANK": "3"})
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    agent = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert Place.of({**torchrun, **agent}) == Place(5, 8, 1, 4, True, 2, False)
    assert Place.of({"RANK": "0", "WORLD_SIZE": "2"}) == Place(0, 2, 0, 0, True, 0, True)
    assert not Place.of({"RANK": "0", "WORLD_SIZE": "2", **agent}).hosts_store


def test_one_process_launched_several_times_is_refused():
    check_engine("single", Place(0, 1, launched=True))
    with pytest.raises(BadInput, match="engine=single is one process, and 4 ranks were launched. Choose engine=fsdp"):
        check_engine("single", Place(1, 4))


def test_each_rank_has_the_gpu_of_its_number(monkeypatch):
    def device(name, num_gpus, **place):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        return str(device_of(name, Place(size=4, **place)))

    assert [device("auto", 4, rank=4 + i, local_rank=i, local_size=4) for i in range(4)] == [
        "cuda:0",
        "cuda:1",
        "cuda:2",
        "cuda:3",
    ]
    assert device("cuda", 1, rank=3, local_rank=3) == "cuda:0"  # a launcher showed each rank its own
    assert device("cpu", 4, local_rank=2) == "cpu"
    assert device("auto", 0, local_rank=2) == "cpu"
    with pytest.raises(BadInput, match="Rank 3 is number 2 on its host, which has 2 GPUs.*Start 2 ranks there"):
        device("auto", 2, rank=3, local_rank=2, local_size=3)
    with pytest.raises(BadInput, match="which has 1 GPUs"):
        device("auto", 1, rank=1, local_rank=1, local_size=2)
    with pytest.raises(BadInput, match="training.device=cuda:1 is one for 4 ranks. Use training.device=auto"):
        device("cuda:1", 4, local_rank=1)


@pytest.mark.parametrize(
    ("num_ranks", "tokens", "lanes", "micro_steps", "message"),
    [
        (3, 2048, 64, 1, r"2048 is no multiple of 3 \(3 ranks.*nearest: 2046 or 2049"),
        (3, 2048, 64, 1, r"data.num_lanes=64 is no multiple of 3 ranks; nearest: 63 or 66"),
        (3, 2048, 64, 1, r"These settings allow 2 or 4 ranks"),
        (4, 2040, 64, 4, r"2040 is no multiple of 16 .*num_micro_steps=4\); nearest: 2032 or 2048. .* allow 2 ranks"),
        (128, 2048, 64, 1, r"data.num_lanes=64 is no multiple of 128 ranks; nearest: 128\. These settings allow 64"),
        (1, 100, 64, 3, r"100 is no multiple of 3 .*nearest: 99 or 102\.$"),
    ],
)
def test_numbers_of_ranks_that_cannot_share_are_refused_with_those_that_can(
    tmp_path, num_ranks, tokens, lanes, micro_steps, message
):
    settings = settings_of(tmp_path)
    settings.training.num_tokens_per_step, settings.data.num_lanes = tokens, lanes
    settings.training.num_micro_steps = micro_steps
    with pytest.raises(BadInput, match=message):
        check_ranks(settings, num_ranks)


def test_numbers_of_ranks_that_can_share(tmp_path):
    settings = settings_of(tmp_path)
    settings.training.num_tokens_per_step, settings.data.num_lanes, settings.training.num_micro_steps = 2048, 64, 2
    for num_ranks in (1, 2, 4, 32, 64):
        check_ranks(settings, num_ranks)
    settings.data.num_lanes = 7  # of one process any number will do
    check_ranks(settings, 1)
