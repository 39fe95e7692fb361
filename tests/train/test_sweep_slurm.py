"""What is asked of Slurm for a sweep, and how its answers are read; tests/slurm runs sweeps on a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from extract.command import compose
from extract.errors import BadInput
from train.config import TrainSettings
from train.sweep import Member
from train.sweep_slurm import (
    ROOT,
    Job,
    SlurmOptions,
    SlurmRunner,
    command_of,
    elements_of,
    look_first,
    parameters,
    submission_environment,
)


def members_of(*overrides: str, num: int = 3) -> list[Member]:
    """Members of the demo over k."""
    lines = [["experiment=demo/base_simpo", f"crosscoder.k={k + 1}", *overrides] for k in range(num)]
    return [Member(line, compose(TrainSettings, line), Path(f"runs/k={k}"), "g") for k, line in enumerate(lines)]


def test_an_element_is_the_script_of_a_single_training():
    members = members_of(num=2)
    assert [command_of(element) for element in elements_of(members, SlurmOptions())] == [
        ["bash", str(ROOT / "slurm" / "train.sh"), *member.overrides] for member in members
    ]


def test_members_that_share_a_reader_fill_nodes_by_their_data():
    members = members_of("sweep.share_reader=true") + members_of("sweep.share_reader=true", "hookpoint=block9", num=2)
    mixed = [members[number] for number in (0, 3, 1, 4, 2)]
    elements = elements_of(mixed, SlurmOptions(gpus_per_node=2))
    found = [[(m.settings.hookpoint, m.settings.crosscoder.k) for m in element] for element in elements]
    assert found == [[("block15", 1), ("block15", 2)], [("block15", 3)], [("block9", 1), ("block9", 2)]]
    assert command_of(elements[1])[1:] == [
        str(ROOT / "slurm" / "sweep_members.sh"),
        str(members[2].record_file.resolve()),
    ]
    with pytest.raises(BadInput, match="=2 with sweep.share_reader=true"):
        elements_of(members, SlurmOptions(nodes=2))


def test_what_is_asked_of_slurm(tmp_path):
    asked = parameters(SlurmOptions(nodes=2, ranks_per_node=4, sbatch={"constraint": "a100"}), tmp_path / "x.log")
    assert (asked["nodes"], asked["ntasks_per_node"], asked["time"], asked["use_srun"]) == (2, 4, 1440, False)
    assert "gpus_per_node" not in asked and "partition" not in asked
    extra = asked["additional_parameters"]
    assert extra == {"signal": "B:USR1@120", "requeue": True, "output": str(tmp_path / "x.log"), "constraint": "a100"}


def test_the_sites_variables_count_but_not_against_the_launcher(tmp_path, monkeypatch):
    site = tmp_path / "site.sh"
    site.write_text("echo welcome\nexport SBATCH_PARTITION=short SBATCH_ACCOUNT=lab OTHER=1\n")
    monkeypatch.setenv("CROSSDIFF_SITE", str(site))
    monkeypatch.setenv("SBATCH_TIMELIMIT", "10")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    with submission_environment(SlurmOptions(partition="long")):
        assert os.environ["SBATCH_ACCOUNT"] == "lab" and os.environ["SBATCH_TIMELIMIT"] == "10"
        assert "SBATCH_PARTITION" not in os.environ and "OTHER" not in os.environ
    assert "SBATCH_ACCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (Job("RUNNING"), "RUNNING"),
        (Job("PENDING", 0, "Resources"), "PENDING (Resources)"),
        (Job("FAILED", 2), "failed with status 2"),
        (Job("FAILED", -9), "killed by SIGKILL"),
        (Job("TIMEOUT"), "TIMEOUT"),
        (Job("PREEMPTED"), "PREEMPTED"),
        (Job("REVOKED"), "REVOKED"),
        (Job("FORGOTTEN"), "ended some time ago (Slurm has forgotten the job)"),
    ],
)
def test_what_slurm_says_in_words(job, text):
    assert str(job) == text and job.is_over == (job.state not in ("RUNNING", "PENDING"))


def test_a_job_that_never_starts_says_so():
    assert "it will never start" in str(Job("PENDING", 0, "PartitionTimeLimit"))


def test_without_slurm_there_is_one_message(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="needs Slurm's sbatch"):
        SlurmRunner(SlurmOptions())(members_of(num=1))


def test_what_cannot_work_is_refused_before_it_is_submitted(tmp_path):
    (member,) = members_of(f"outputs={tmp_path}", num=1)
    with pytest.raises(BadInput, match="does not exist"):
        look_first(member, SlurmOptions())
