"""A 2x2 sweep as an array on a real Slurm: one member is preempted and goes on, one is killed and named, and the same
command then runs that one alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import LOOK_S, Cluster
from tests.slurm.studies import Studied, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_STEPS = 1000
NAMES = [f"base_tuned,k={k},num_tokens={64 * NUM_STEPS}{seed}" for k in (3, 5) for seed in ("", ",seed=1")]
PREEMPTED, KILLED = NAMES[0], NAMES[3]


def command_of(studied: Studied, *more: str) -> list[str]:
    store = f"store={studied.checkout.store}"
    common = ["experiment=small/base_tuned", "outputs=outputs/sweep", store, "hydra/launcher=slurm"]
    run = [f"training.num_tokens={64 * NUM_STEPS}", "training.checkpoint_every=20"]
    return [sys.executable, "-m", "train", "-m", *common, *run, "crosscoder.k=3,5", "seed=0,1", *more]


def record_of(outputs: Path, name: str) -> dict[str, str | None]:
    path = outputs / "sweeps" / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def wait_for_steps(outputs: Path, name: str, process: subprocess.Popen[str], number: int) -> str:
    """The job of a member that has taken some steps."""
    while max(steps_of(outputs / "runs" / name), default=0) < number:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(LOOK_S)
    job = record_of(outputs, name)["job"]
    assert job
    return job


def jobs_of(outputs: Path, process: subprocess.Popen[str]) -> list[str | None]:
    """The jobs of all members, once they are submitted."""
    while not all(record_of(outputs, name).get("job") for name in NAMES):
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(LOOK_S)
    return [record_of(outputs, name)["job"] for name in NAMES]


def test_a_sweep_is_an_array_whose_members_go_on_alone(cluster: Cluster, studied: Studied) -> None:
    folder, outputs = studied.checkout.folder, studied.checkout.folder / "outputs" / "sweep"
    process = subprocess.Popen(
        cluster.login.command(command_of(studied), folder),
        cwd=folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    jobs = jobs_of(outputs, process)
    second = cluster.run(*command_of(studied, "hydra.launcher.wait=false"), cwd=folder, timeout=600)
    assert second.returncode == 0 and "of an earlier command goes on" in second.stdout, second.stdout
    assert jobs_of(outputs, process) == jobs

    preempted = wait_for_steps(outputs, PREEMPTED, process, 10)
    cluster.must("scancel", "--batch", "--signal=USR1", preempted)
    killed = wait_for_steps(outputs, KILLED, process, 10)
    cluster.must("scancel", killed)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 1, said

    array, _, element = killed.partition("_")
    assert element == "3" and preempted == f"{array}_0"
    assert "4 of 4 members to run" in said and "error: 1 of 4 members are not finished" in said
    assert said[said.index("error: ") :].count("\nbase_tuned,k=") == 1 and f"{KILLED}: CANCELLED" in said
    finished = sorted(path.parent.parent.name for path in outputs.glob("runs/*/crosscoder/config.json"))
    assert finished == NAMES[:3]
    assert "start 2" in (outputs / "logs" / f"sweep-{preempted}.log").read_text()
    assert [record_of(outputs, name)["ended"] for name in NAMES] == [*["COMPLETED"] * 3, "CANCELLED"]

    written = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/crosscoder/config.json")}
    steps = max(steps_of(outputs / "runs" / KILLED))
    again = cluster.run(*command_of(studied, "hydra.launcher.nodes=2"), cwd=folder, timeout=900)
    assert again.returncode == 0 and "1 of 4 members to run" in again.stdout, again.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written
    log = Path(record_of(outputs, KILLED)["log_file"] or "").read_text()
    assert "2 node(s)" in log and "Resuming from" in log and "train.sh: finished." in log
    assert 0 < steps < NUM_STEPS and steps_of(outputs / "runs" / KILLED) == list(range(1, NUM_STEPS + 1))
    assert cluster.must("squeue", "--noheader") == ""


def test_what_slurm_refuses_is_one_message(cluster: Cluster, studied: Studied) -> None:
    more = ["hydra.launcher.partition=nowhere", "outputs=outputs/refused"]
    refused = cluster.run(*command_of(studied, *more), cwd=studied.checkout.folder, timeout=300)
    assert refused.returncode == 2 and "error: Slurm refused the sweep" in refused.stdout, refused.stdout
    assert "invalid partition" in refused.stdout and "hydra.launcher.partition" in refused.stdout
    assert cluster.must("squeue", "--noheader") == ""


def test_members_that_share_a_reader_are_one_element(cluster: Cluster, studied: Studied) -> None:
    more = ["sweep.share_reader=true", "outputs=outputs/shared", f"training.num_tokens={64 * 50}"]
    done = cluster.run(*command_of(studied, *more), cwd=studied.checkout.folder, timeout=900)
    assert done.returncode == 0 and "All members are finished" in done.stdout, done.stdout
    sweeps = studied.checkout.folder / "outputs" / "shared" / "sweeps"
    records = [json.loads(path.read_bytes()) for path in sorted(sweeps.glob("*.json"))]
    jobs: dict[str, list[int]] = {}
    for record in records:
        jobs.setdefault(record["job"], []).append(record["settings"]["seed"])
        assert record["ended"] == "COMPLETED"
        assert Path(record["log_file"]).read_text().count("One process reads the store for 2 members") == 1
    assert sorted(jobs.values()) == [[0, 0], [1, 1]]
