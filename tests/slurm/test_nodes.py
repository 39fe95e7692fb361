"""A node that disappears from the network takes no more than the time since the last checkpoint."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.studies import Studied, steps_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_STEPS = 1000  # which no job has taken before the nodes are gone
HANG_S = 20  # after which ranks take silence for a failure
LOST = (0, 1)  # of a job's nodes: that of the batch script, which Slurm misses, and another, which ranks miss


def nodes_of(hosts: Cluster, job: str) -> list[str]:
    (shown,) = hosts.shown(job)
    return hosts.must("scontrol", "show", "hostnames", shown["NodeList"]).splitlines()


def test_jobs_that_lose_a_node_finish_on_others(hosts: Cluster, studied: Studied) -> None:
    """Two jobs at a time, for most of it is waiting until somebody misses the node."""
    assert hosts.network is not None
    checkout, options = studied.checkout, ("--nodes=2", "--cpus-per-task=40")  # of 64: a node for one job
    settings = [f"engine.timeout_s={HANG_S}", f"training.num_tokens={64 * NUM_STEPS}"]
    jobs = [checkout.train(hosts, f"lost{n}", *options, settings=settings, RANKS_PER_NODE="1") for n in LOST]
    runs = [checkout.run(f"lost{n}").with_name(f"base_tuned,num_tokens={64 * NUM_STEPS}") for n in LOST]
    for job, run in zip(jobs, runs, strict=True):
        until(hosts, job, lambda run=run: len(steps_of(run)) >= 60)
    lost = [nodes_of(hosts, job)[n] for job, n in zip(jobs, LOST, strict=True)]
    for node in lost:
        hosts.network.cut(node)
    try:
        assert hosts.wait(*jobs) == "COMPLETED", hosts.logs(*jobs)
    finally:
        for node in lost:
            hosts.network.mend(node)
    for job, run, node in zip(jobs, runs, lost, strict=True):
        (shown,) = hosts.shown(job)
        assert int(shown["Restarts"]) >= 1
        assert node not in nodes_of(hosts, job)
        assert steps_of(run) == list(range(1, NUM_STEPS + 1))
        assert "Resuming from " in hosts.log(job)
        assert " train.sh: finished.\n" in hosts.log(job)
