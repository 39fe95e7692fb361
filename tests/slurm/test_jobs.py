"""When a job is requeued, and what the scripts ask Slurm: programs of a few lines stand in for Slurm and for Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.stand_in import script

# What the scripts ask Slurm, of which the controller does not answer (the first time).
CLUSTER = {
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "squeue": "exit 1",
    "scontrol": 'echo "asked: $*"; if [ -e "$ASKED" ]; then kill -TERM $PPID; else touch "$ASKED"; exit 1; fi',
}


@pytest.fixture
def job(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of the script of a job, whose controller answers the second time."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in CLUSTER.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_PARTITION": "main", "CROSSDIFF_BATCH": "1"}
    return {**environment, **own, "PATH": f"{tools}:{environment['PATH']}", "ASKED": f"{tmp_path}/asked"}


def test_a_time_limit_that_slurm_does_not_tell_is_not_checked(job):
    done = script("train_pt_it", job)
    assert done.returncode == 0 and "rank alone" in done.stdout
    assert "preflight: -m train.preflight experiment=gemma2_9b/pt_it gpus=1 gpus_per_node=1\n" in done.stdout


def test_a_controller_that_does_not_answer_is_asked_again_to_requeue(job):
    done = script("extract", job, ACT="exit 75")
    assert done.stdout.count("asked: requeue 7\n") == 2 and "could not be requeued" not in done.stdout


@pytest.mark.parametrize(("status", "again"), [(1, 0), (2, 0), (70, 1), (75, 1), (130, 1), (137, 1)])
def test_a_job_is_requeued_after_what_the_same_command_would_continue(status, again, job):
    Path(job["ASKED"]).touch()
    done = script("extract", job, ACT=f"exit {status}")
    assert done.stdout.count("asked: requeue 7\n") == again


def test_deaths_before_python_counts_them_are_bounded(job):
    done = script("tokens", job, ACT="kill -9 $$", SLURM_RESTART_COUNT="10")
    assert done.returncode == 137 and "asked:" not in done.stdout
    assert "restarted 10 times" in done.stdout and "killed by signal 9" in done.stdout.splitlines()[-1]
    done = script(
        "tokens", job, ACT="exit 130", SLURM_RESTART_COUNT="10"
    )  # as pre-emption ends it, any number of times
    assert "asked: requeue 7" in done.stdout


def test_jobs_for_the_cpu_may_run_where_the_site_has_gpus(job):
    refused = script("extract", job, GPUS_PER_NODE="4")
    assert refused.returncode == 2 and "error: This job has no GPUs" in refused.stdout
    done = script("extract", job, "activations.device=cpu", GPUS_PER_NODE="4")
    assert done.returncode == 0 and "rank alone" in done.stdout
