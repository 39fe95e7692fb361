"""Slurms for tests: brought up once a session, skipped with the reason where that cannot be, but never in CI."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.daemons import CannotStart
from tests.slurm.stand_in import stand_in
from tests.slurm.studies import Checkout, Studied


def started(num_nodes: int, accounting: bool, namespaces: bool, lost_after_s: int) -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster.up(num_nodes, accounting, namespaces, lost_after_s))
        except (CannotStart, OSError) as error:
            if os.environ.get("CROSSDIFF_REQUIRE_SLURM") == "1":
                pytest.fail(f"CROSSDIFF_REQUIRE_SLURM=1, and no Slurm: {error}", pytrace=False)
            pytest.skip(f"no Slurm: {error}")
        yield cluster


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Without Slurm, with a program in place of Python."""
    return stand_in(tmp_path)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes on this machine, with accounting."""
    yield from started(2, accounting=True, namespaces=False, lost_after_s=60)


@pytest.fixture(scope="session")
def hosts() -> Iterator[Cluster]:
    """Six nodes with names, addresses and links of their own, which can be cut; without accounting."""
    yield from started(6, accounting=False, namespaces=True, lost_after_s=10)


@pytest.fixture(scope="session")
def studied(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    """The small study after `pipeline.sh`, on two nodes with two ranks each."""
    checkout = Checkout.make(tmp_path_factory.mktemp("checkout"))
    said = cluster.must(
        "bash", "slurm/pipeline.sh", "experiment=small", cwd=checkout.folder, TRAIN_NODES="2", EXTRACT_TASKS="2"
    )
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE))
    return Studied(checkout, jobs, cluster.wait(*jobs.values(), timeout=1200))


@pytest.fixture(autouse=True)
def no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves its nodes to the next one."""
    yield
    for name in {"cluster", "hosts"} & set(request.fixturenames):
        request.getfixturevalue(name).cancel_all()
