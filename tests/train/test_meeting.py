"""Where a process belongs, from the variables that launchers set."""

import pytest

from train.meeting import ALONE, Place, tasks_per_node

# What srun gives to rank 3 of 5, the first task of its second node, in a job that a script of slurm/ started.
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "20259",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TASK.items() if name not in names}


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4]), ("16(x2),8,2", [16, 16, 8, 2])],
)
def test_lists_of_tasks_are_written_out(text, tasks):
    assert tasks_per_node(text) == tasks


def test_a_task_of_a_step_is_a_rank():
    assert Place.of(TASK) == Place(3, 5, 0, 2, launched=True, restart=0, hosts_store=False)


def test_restarts_of_the_job_are_those_of_its_ranks():
    assert Place.of({**TASK, "SLURM_RESTART_COUNT": "2"}).restart == 2


def test_rank_0_hosts_the_store():
    assert Place.of({**TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).hosts_store


def test_the_jobs_own_list_stands_in_where_the_step_has_none():
    environment = {**without("SLURM_STEP_TASKS_PER_NODE"), "SLURM_TASKS_PER_NODE": "3,2"}
    assert Place.of(environment).local_size == 2


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS"])
def test_a_process_in_a_job_that_nothing_launched_is_alone(name):
    """`python -m train` in the shell of an allocation has Slurm's variables too."""
    assert Place.of(without(name)) == ALONE


def test_one_task_is_alone():
    assert Place.of({**TASK, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == ALONE


def test_torchruns_variables_come_before_those_of_the_step_that_runs_it():
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Place.of({**TASK, **torchrun}) == Place(1, 2, 1, 2, launched=True)


def test_tasks_with_gpus_of_their_own_are_told_so():
    assert not Place.of(TASK).own_gpu and Place.of({**TASK, "SLURM_GPUS_PER_TASK": "1"}).own_gpu
