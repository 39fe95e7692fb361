"""Signals that come when ranks do not listen yet, or to ranks that do not heed them: no job ends for that.

A program of a few lines stands in for Python, so that a rank does what it is to do when it is to do it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.studies import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "- "*) cat >/dev/null; echo "gpus 0"; exit ;;
  *train.preflight*) exit ;;
esac
exec python3 -S -c "$RANK_DOES"
"""
# The second start of the job finishes; the first is at its imports when it has said that it is there.
BEGINS = """
import os, pathlib, signal, sys, time
if os.environ.get("SLURM_RESTART_COUNT"):
    sys.exit()
pathlib.Path(os.environ["SEEN"], os.environ["SLURM_PROCID"]).touch()
time.sleep(2)
"""
LISTENS = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\ntime.sleep(300)\n"
DOES_NOT = "time.sleep(300)\n"


def submit(cluster: Cluster, folder: Path, rank_does: str) -> str:
    """A training of two ranks on each of two nodes, all of which are there when this returns."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    seen = folder / "seen"
    seen.mkdir()
    own = {"PYTHON": str(python), "CROSSDIFF_SITE": "/dev/null", "RANK_DOES": BEGINS + rank_does, "SEEN": str(seen)}
    options = ["--nodes=2", "--ntasks-per-node=2", "--time=60", f"--output={folder}/%x-%j.log"]
    job = cluster.sbatch(*options, "slurm/train_pt_simpo.sh", **own)
    until(cluster, job, lambda: len(list(seen.iterdir())) == 4)
    return job


def test_ranks_that_do_not_listen_yet_hear_of_it_later(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, LISTENS)
    cluster.must("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, timeout=120) == "COMPLETED", cluster.log(job)
    assert "status 75: not finished" in cluster.log(job)  # not 138, killed by it
    assert [shown["Restarts"] for shown in cluster.shown(job)] == ["1"]


def test_a_job_whose_ranks_do_not_end_is_requeued_before_its_time_is_up(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, DOES_NOT)
    cluster.must("scontrol", "update", f"JobId={job}", "EndTime=now+30")
    cluster.must("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, timeout=120) == "COMPLETED", cluster.log(job)
    assert "have not saved in time" in cluster.log(job) and "status 75: not finished" in cluster.log(job)
    assert [shown["Restarts"] for shown in cluster.shown(job)] == ["1"]


def test_a_cancelled_job_ends_and_says_how_to_go_on(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, LISTENS)
    cluster.must("scancel", job)
    assert cluster.wait(job, timeout=60) == "CANCELLED"
    until(
        cluster, job, lambda: "To continue" in cluster.last_lines(job, 1) or "to continue" in cluster.last_lines(job, 1)
    )
    assert [shown["Restarts"] for shown in cluster.shown(job)] == ["0"]
