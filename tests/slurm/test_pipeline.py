"""A whole study by `pipeline.sh` on two nodes with two ranks each, and parts of it done again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster
from tests.slurm.studies import NUM_STEPS, Checkout, Studied, steps_of, until
from tests.wandb_files import offline_parts, promised
from train.crosscoder import Crosscoder
from train.metric_table import EVERY, VALIDATION
from train.stops import EXIT_STOPPED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGES = ["tokens", "extract", "train_base_tuned", "train_base_third", "analysis"]


def test_the_pipeline_does_the_whole_study(cluster: Cluster, studied: Studied) -> None:
    checkout = studied.checkout
    assert list(studied.jobs) == STAGES
    assert studied.state == "COMPLETED", cluster.logs(*studied.jobs.values())
    for stage, job in studied.jobs.items():
        assert {task["Restarts"] for task in cluster.shown(job)} == {"0"}
        for log in cluster.log_files(job):
            assert log.read_text().endswith(f" {stage.split('_')[0]}.sh: finished.\n")
    cluster.must("python", "-m", "extract.verify", "experiment=small", "mode=full", cwd=checkout.folder)
    for pair in ("base_tuned", "base_third"):
        run = checkout.run().with_name(pair)
        assert steps_of(run) == list(range(1, NUM_STEPS + 1))
        assert Crosscoder.load(run / "crosscoder").models == pair.split("_")
        assert (checkout.folder / "outputs" / "small" / "analysis" / pair / "latents.parquet").exists()
    assert "base_tuned" in (checkout.folder / "outputs" / "small" / "report" / "index.html").read_text()


def test_stages_ran_where_and_as_many_as_they_should(cluster: Cluster, studied: Studied) -> None:
    """Training on both nodes with four ranks; an array of two; each after what it reads."""
    (training,) = cluster.shown(studied.jobs["train_base_tuned"])
    assert training["NodeList"] == "node[1-2]"
    newest = max((studied.checkout.run() / "checkpoints").iterdir())
    assert len(list(newest.glob("state-*-of-00004.safetensors"))) == 4
    tasks = cluster.shown(studied.jobs["extract"])
    assert sorted(task["ArrayTaskId"] for task in tasks) == ["0", "1"]
    (tokens,), (analysis,) = cluster.shown(studied.jobs["tokens"]), cluster.shown(studied.jobs["analysis"])
    assert all(tokens["EndTime"] <= task["StartTime"] and task["EndTime"] <= training["StartTime"] for task in tasks)
    assert training["EndTime"] <= analysis["StartTime"]


def test_a_training_told_to_save_is_requeued_and_ends_with_the_same_bits(cluster: Cluster, studied: Studied) -> None:
    """As many ranks add the same numbers in the same order, and a checkpoint holds float32 as it is: nothing rounds
    differently, so weights are equal bit for bit.
    """
    checkout = studied.checkout
    job = checkout.train(cluster, "interrupted", "--nodes=2", WANDB_MODE="offline")
    run = checkout.run("interrupted")
    until(cluster, job, lambda: len(steps_of(run)) >= 20)
    cluster.must("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    (shown,) = cluster.shown(job)
    assert shown["Restarts"] == "1"
    saved = [line for line in cluster.log(job).splitlines() if line.startswith("Stopped after step")]
    assert len(saved) == 1 and 20 <= int(saved[0].split()[3].rstrip(";")) < NUM_STEPS
    assert "is requeued and continues by itself" in cluster.log(job)
    assert cluster.last_lines(job, 1).endswith(" train.sh: finished.")
    assert steps_of(run) == list(range(1, NUM_STEPS + 1))
    for file in ("crosscoder.safetensors", "config.json"):
        ours, theirs = (folder / "crosscoder" / file for folder in (run, checkout.run()))
        assert ours.read_bytes() == theirs.read_bytes()
    assert load_file(ours.with_name("crosscoder.safetensors"))["W_dec"].abs().sum() > 0
    assert_one_wandb_run(run, job)


def assert_one_wandb_run(run: Path, job: str) -> None:
    """What W&B has of a requeued job: two parts of one run, every step once, with all that training promises."""
    parts = offline_parts(run)
    assert len(parts) == 2 and len({part.run_id for part in parts}) == 1
    assert [part.exit_code for part in parts] == [EXIT_STOPPED, 0] and parts[0].preempting
    rows = [row for part in parts for row in part.history]
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert all(promised(EVERY, row) for row in rows)
    assert [row["step"] for row in rows if promised(VALIDATION, row)] == [100, 200, 300, 400]
    assert [part.config["slurm"]["job_id"] for part in parts] == [job, job]
    assert [part.config["slurm"].get("restart_count", "0") for part in parts] == ["0", "1"]


def test_a_cancelled_extraction_is_completed_by_a_rerun_with_the_same_bytes(cluster: Cluster, studied: Studied) -> None:
    checkout = studied.checkout
    store = checkout.folder / "outputs" / "cancelled" / "store"
    shutil.copytree(checkout.store / "tokens", store / "tokens")
    job = extract(cluster, checkout, "cancelled")
    until(cluster, job, lambda: len(list(store.glob("activations/*/*/shard-*.index"))) >= 2)
    cluster.must("scancel", f"{job}_0")
    assert cluster.wait(job) == "CANCELLED"
    until(cluster, job, lambda: "to continue: sbatch slurm/extract.sh" in cluster.last_lines(job, 1))
    finished = sorted(store.glob("activations/*/*/shard-*.index"))
    expected = sorted(checkout.store.glob("activations/*/*/shard-*.index"))
    assert 0 < len(finished) < len(expected)
    again = extract(cluster, checkout, "cancelled")
    assert cluster.wait(again) == "COMPLETED", cluster.log(again)
    assert_same_store(cluster, checkout, store)


def test_the_other_task_of_an_array_completes_what_a_cancelled_one_leaves(cluster: Cluster, studied: Studied) -> None:
    checkout = studied.checkout
    store = checkout.folder / "outputs" / "shared" / "store"
    shutil.copytree(checkout.store / "tokens", store / "tokens")
    job = extract(cluster, checkout, "shared", tasks="0-1")
    first, second = (checkout.folder / f"extract-{job}_{task}.log" for task in (0, 1))
    until(cluster, job, lambda: all(" start 1, " in _text(log) for log in (first, second)))
    until(cluster, job, lambda: any(store.glob("activations/*/*/shard-*.index")))
    cluster.must("scancel", f"{job}_0")
    assert cluster.wait(job) == "CANCELLED,COMPLETED", cluster.log(job)
    assert "to continue: sbatch slurm/extract.sh" in _text(first) and _text(second).endswith("extract.sh: finished.\n")
    assert_same_store(cluster, checkout, store)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def assert_same_store(cluster: Cluster, checkout: Checkout, store: Path) -> None:
    """The bytes of the study's own store, with all hashes and sums as they should be."""
    for file in sorted(checkout.store.glob("activations/*/*/shard-*.tar")):
        assert (store / file.relative_to(checkout.store)).read_bytes() == file.read_bytes()
    cluster.must(
        "python", "-m", "extract.verify", "experiment=small", f"store={store}", "mode=full", cwd=checkout.folder
    )


def extract(cluster: Cluster, checkout: Checkout, outputs: str, tasks: str = "0") -> str:
    """An extraction by tasks with one worker each, into outputs of its own."""
    own = ["experiment=small", f"outputs=outputs/{outputs}"]
    options = [f"--array={tasks}", "--time=60"]
    return cluster.sbatch(*options, "slurm/extract.sh", *own, cwd=checkout.folder, RANKS_PER_NODE="1")
