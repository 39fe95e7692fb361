"""A node that disappears from the network takes no more than the time since the last checkpoint."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.studies import NUM_STEPS, Studied, steps_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HANG_S = 20  # after which ranks take silence for a failure


@pytest.mark.parametrize("lost", [0, 1], ids=["the-node-of-the-batch-script", "another-node"])
def test_a_job_that_loses_a_node_finishes_on_others(hosts: Cluster, studied: Studied, lost: int) -> None:
    assert hosts.network is not None
    checkout, outputs = studied.checkout, f"lost{lost}"
    run = checkout.run(outputs)
    job = checkout.train(hosts, outputs, "--nodes=2", settings=[f"engine.timeout_s={HANG_S}"], RANKS_PER_NODE="1")
    until(hosts, job, lambda: len(steps_of(run)) >= 60)
    (shown,) = hosts.shown(job)
    node = hosts.must("scontrol", "show", "hostnames", shown["NodeList"]).splitlines()[lost]
    hosts.network.cut(node)
    try:
        assert hosts.wait(job) == "COMPLETED", hosts.log(job)
    finally:
        hosts.network.mend(node)
    (shown,) = hosts.shown(job)
    assert int(shown["Restarts"]) >= 1
    assert node not in hosts.must("scontrol", "show", "hostnames", shown["NodeList"]).splitlines()
    assert steps_of(run) == list(range(1, NUM_STEPS + 1))
    assert "step-" in hosts.log(job)  # where it resumed
    assert hosts.last_lines(job, 1).endswith(" train.sh: finished.")
    until(hosts, job, lambda: hosts.must("sinfo", "--noheader", "--format=%T") == "idle", timeout=120)
