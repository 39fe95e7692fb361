"""What a user can mend ends with one message that says how, and is not tried again."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.studies import Studied

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def pipeline(cluster: Cluster, studied: Studied, *settings: str, **more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["experiment=small", "outputs=outputs/refused", *settings]
    return cluster.run("bash", "slurm/pipeline.sh", *arguments, cwd=studied.checkout.folder, **more)


@pytest.mark.parametrize(("variable", "about"), [("SBATCH_PARTITION", "partition"), ("SBATCH_ACCOUNT", "account")])
def test_what_slurm_does_not_know_is_refused_before_anything_is_submitted(
    cluster: Cluster, studied: Studied, variable: str, about: str
) -> None:
    alone = cluster.run("sbatch", "slurm/tokens.sh", cwd=studied.checkout.folder, **{variable: "nowhere"})
    assert alone.returncode != 0 and about in alone.stdout.lower()
    done = pipeline(cluster, studied, **{variable: "nowhere"})
    assert done.returncode == 2
    assert_one_error(done.stdout, f"{variable}=nowhere", "nothing is submitted")
    assert cluster.must("squeue", "--noheader") == ""


def test_a_study_whose_jobs_have_not_ended_is_not_submitted_again(cluster: Cluster, studied: Studied) -> None:
    first = pipeline(cluster, studied, SBATCH_ARGS="--hold")
    assert first.returncode == 0, first.stdout
    queue = cluster.must("squeue", "--noheader", "--format=%F %j")
    again = pipeline(cluster, studied)
    assert again.returncode == 2
    tokens = queue.splitlines()[-1].split()[0]
    assert_one_error(again.stdout, f"tokens {tokens} PENDING", "train_base_third", "scancel ")
    assert cluster.must("squeue", "--noheader", "--format=%F %j") == queue
    cluster.must("scancel", *again.stdout.partition("scancel ")[2].splitlines()[0].split())
    assert cluster.must("squeue", "--noheader") == ""


def test_a_pipeline_asks_for_what_the_stages_need(cluster: Cluster, studied: Studied) -> None:
    """The site's hour is more than the partition allows, and its GPUs are for training: options say otherwise."""
    site = {"SBATCH_PARTITION": "urgent", "SBATCH_GPUS_PER_NODE": "2", "SBATCH_CPUS_PER_GPU": "8"}
    refused = pipeline(cluster, studied, SBATCH_ARGS="--hold", **site)
    assert refused.returncode == 2 and "exceeds that of the partition" in refused.stdout
    nodes = pipeline(cluster, studied, SBATCH_ARGS="--hold -t 30", TRAIN_ARGS="--nodes=2", **site)
    assert nodes.returncode == 2 and "TRAIN_NODES" in nodes.stdout
    done = pipeline(cluster, studied, SBATCH_ARGS="--hold -t 30", **site)
    assert done.returncode == 0, done.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    gpus = {stage: cluster.shown(job)[0].get("TresPerNode", "none") for stage, job in jobs.items()}
    assert [gpus[stage][-1] for stage in ("extract", "train_base_tuned", "analysis")] == ["2", "2", "1"], gpus
    assert gpus["tokens"] == "none"


def test_memory_that_does_not_suffice_is_said_before_anything_is_submitted(cluster: Cluster, studied: Studied) -> None:
    settings = ["training.device=auto", "crosscoder.num_latents=2_000_000_000"]
    done = pipeline(cluster, studied, *settings, GPU="h100", GPUS_PER_NODE="2")
    assert done.returncode == 2
    assert_one_error(done.stdout, "GiB on each GPU")
    assert cluster.must("squeue", "--noheader") == ""


def test_a_missing_store_ends_a_job_for_good(cluster: Cluster, studied: Studied) -> None:
    job = cluster.sbatch(
        "--time=60",
        "slurm/train.sh",
        "experiment=small/base_tuned",
        "outputs=outputs/nothing",
        cwd=studied.checkout.folder,
    )
    assert_refused(cluster, job, "outputs/nothing/store", "extract.tokens")


def test_a_time_limit_below_a_checkpoint_interval_ends_a_job_for_good(cluster: Cluster, studied: Studied) -> None:
    """Three minutes are what start-up and notice take. How long an interval is the finished run of the study says."""
    job = studied.checkout.train(cluster, "small", "--time=3")
    assert_refused(cluster, job, "3:00", "s to a checkpoint at", "training.checkpoint_every=50", "--time=")


def test_a_time_limit_below_start_up_and_notice_ends_a_job_for_good(cluster: Cluster, studied: Studied) -> None:
    """No speed is known of a run that never began."""
    job = studied.checkout.train(cluster, "short", "--time=2")
    assert_refused(cluster, job, "2:00", "(start-up 60 s, notice to save 120 s)", "--time=")


def test_an_environment_without_the_packages_ends_a_job_for_good(
    cluster: Cluster, studied: Studied, tmp_path: Path
) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    job = studied.checkout.train(cluster, "empty", PYTHON=str(tmp_path / "empty" / "bin" / "python"), PYTHONPATH="")
    assert_refused(cluster, job, "empty/bin/python", "slurm/site.sh")


def test_a_job_that_never_gets_any_further_ends(cluster: Cluster, studied: Studied, tmp_path: Path) -> None:
    """Its training is killed at every start, as by a node that has too little memory: one restart is allowed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1 $2" != "-m train" ] || kill -9 $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = ["max_restarts_without_progress=1"]
    job = studied.checkout.train(cluster, "killed", settings=settings, PYTHON=str(python), RANKS_PER_NODE="1")
    assert_refused(cluster, job, "max_restarts_without_progress=1", "did not get any further", restarts=2)


def assert_one_error(text: str, *parts: str) -> None:
    """One line says what is wrong, with these parts, and one of the last says what to do."""
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    assert all(part in errors[0] for part in parts), text


def assert_refused(cluster: Cluster, job: str, *parts: str, restarts: int = 0) -> None:
    assert cluster.wait(job) == "FAILED", cluster.log(job)
    (shown,) = cluster.shown(job)
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", str(restarts)), cluster.log(job)
    assert_one_error(cluster.log(job), *parts)
    last = cluster.last_lines(job, 1)
    assert "must be mended" in last and "slurm/train.sh" in last
