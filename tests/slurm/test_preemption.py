"""Jobs whose nodes a partition of higher priority takes: each is continued by itself, and finishes.

GraceTime seconds before it takes the nodes, Slurm sends SIGTERM to the processes of such a job, and its script nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.studies import Checkout, Studied, steps_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_STEPS = 1000


def preempt(cluster: Cluster, job: str, ready: Callable[[], bool]) -> None:
    """Take both nodes from `job` for a second once it is `ready`, and see it finish."""
    until(cluster, job, ready)
    urgent = cluster.sbatch(
        "--partition=urgent", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"
    )
    assert cluster.wait(urgent, timeout=120) == "COMPLETED", cluster.log(job)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    assert [shown["Restarts"] for shown in cluster.shown(job)] == ["1"]
    log = cluster.log(job)
    assert log.count("is requeued and continues by itself") == 1 and ", start 2, " in log
    assert log.endswith("sh: finished.\n")


def test_a_training_continues(cluster: Cluster, studied: Studied) -> None:
    settings = [f"training.num_tokens={64 * NUM_STEPS}"]
    job = studied.checkout.train(cluster, "preempted", "--nodes=2", settings=settings, RANKS_PER_NODE="1")
    run = studied.checkout.run("preempted").with_name(f"base_tuned,num_tokens={64 * NUM_STEPS}")
    preempt(cluster, job, lambda: len(steps_of(run)) >= 10)
    assert "status 75: not finished" in cluster.log(job)
    assert steps_of(run) == list(range(1, NUM_STEPS + 1))


def test_an_extraction_continues(cluster: Cluster, studied: Studied) -> None:
    checkout = studied.checkout
    store = checkout.folder / "outputs" / "preempted" / "store"
    shutil.copytree(checkout.store / "tokens", store / "tokens")
    job = extract(cluster, checkout)
    preempt(cluster, job, lambda: any(store.glob("activations/*/*/shard-*.index")))
    assert "status 130: not finished" in cluster.log(job)
    for file in sorted(checkout.store.glob("activations/*/*/shard-*.tar")):
        assert (store / file.relative_to(checkout.store)).read_bytes() == file.read_bytes()


def extract(cluster: Cluster, checkout: Checkout) -> str:
    own = ["experiment=small", "outputs=outputs/preempted"]
    return cluster.sbatch("--array=0", "--time=60", "slurm/extract.sh", *own, cwd=checkout.folder, RANKS_PER_NODE="1")
