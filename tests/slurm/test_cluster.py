"""The private cluster itself: nothing of it stays, whatever happens to the tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.conftest import started
from tests.slurm.guard import marked

OWNER = """
import sys, time
from tests.slurm.cluster import Cluster
with Cluster.up() as cluster:
    job = cluster.sbatch("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
    while cluster.state(job) != "RUNNING":
        time.sleep(0.1)
    print(cluster.plan.folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def plain() -> Iterator[Cluster]:
    """The smallest there is, up in two seconds: the only one that tests need which are not slow."""
    yield from started(2, accounting=False, namespaces=False, lost_after_s=60)


def test_a_job_runs_on_two_nodes(plain: Cluster, tmp_path: Path) -> None:
    job = plain.sbatch("--nodes=2", f"--output={tmp_path}/log", "--wrap=srun printenv SLURMD_NODENAME")
    assert plain.wait(job, timeout=60) == "COMPLETED"
    assert sorted(plain.log(job).split()) == ["node1", "node2"]


@pytest.mark.slow
def test_a_killed_owner_takes_daemons_jobs_and_files_along(cluster: Cluster) -> None:
    """`cluster` tells whether there can be one; the killed one is another beside it."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    mark = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    end_at = time.monotonic() + 30  # a job runs before its steps do
    while len(list(marked(mark))) < 6 and time.monotonic() < end_at:
        time.sleep(0.1)
    assert len(list(marked(mark))) >= 6  # munged, slurmctld, two slurmd, and sleep on each node
    owner.kill()
    owner.communicate()
    end_at = time.monotonic() + 20
    while folder.exists() and time.monotonic() < end_at:
        time.sleep(0.1)
    assert not folder.exists()
    assert not list(marked(mark))
    assert cluster.must("sinfo", "--noheader", "--partition=main", "--format=%T") == "idle"
