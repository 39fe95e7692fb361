"""Searches, by Optuna and by what it would choose: what is run, handed back, and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from planted import random_store, train_arguments

from extract.command import _members
from extract.errors import BadInput
from train.sweep import Member, Sweep, objective
from train.trainer import train

ROOT = Path(__file__).parents[2]


def config_of_search(num_trials: int) -> DictConfig:
    """What Hydra tells a launcher of a search."""
    runtime = {"choices": {"hydra/sweeper": "search"}}
    sweeper = {"params": None, "n_trials": num_trials}
    return OmegaConf.create({"hydra": {"overrides": {"task": []}, "sweeper": sweeper, "runtime": runtime}})


class Recording:
    """A runner that leaves in the folder of each member what a run of its k would: a value, or how it ended."""

    def __init__(self, ended: dict[int, str]):
        self._ended, self.ran = ended, list[int]()

    def __call__(self, members: list[Member]) -> bool:
        for member in members:
            k = member.settings.crosscoder.k
            self.ran.append(k)
            if k in self._ended:
                member.ended = self._ended[k]
            else:
                train(member.settings, member.folder)
        return False


def searched(study: Path, runner: Recording, *batches: list[int]) -> list[list[float | None]]:
    """What a search is told of batches of k, None of those that failed."""
    sweep, told, number = Sweep(config_of_search(4)), [], 0
    for batch in batches:
        found = sweep.run([[*train_arguments(study, 320)[2:], f"crosscoder.k={k}"] for k in batch], number, runner)
        number += len(batch)
        told.append([each.return_value if each.status.name == "COMPLETED" else None for each in found])
    return told


def test_a_search_may_choose_one_run_twice_and_goes_on_after_failures(tmp_path):
    random_store(tmp_path / "store")
    runner = Recording({4: "failed with status 1"})
    (first, second), (third, fourth) = searched(tmp_path, runner, [4, 4], [3, 3])
    assert runner.ran == [4, 3] and (first, second) == (None, None)
    assert third == fourth == objective(next((tmp_path / "runs").glob("*/crosscoder")).parent)
    later = Recording({4: "failed with status 2"})
    assert searched(tmp_path, later, [3, 4]) == [[third, None]]  # with a value to go by no failure ends it


@pytest.mark.parametrize(
    ("status", "batches", "ran", "said"),
    [
        (1, [[3, 4], [5, 4]], [3, 4, 5, 4], "error: 4 trials gave this search nothing to choose by."),
        (2, [[3, 3], [4, 5]], [3], "error: 2 trials gave this search nothing to choose by."),
    ],
)
def test_a_search_with_no_value_ends_with_one_message(tmp_path, capsys, status, batches, ran, said):
    random_store(tmp_path / "store")
    runner = Recording(dict.fromkeys((3, 4, 5), f"failed with status {status}"))
    with pytest.raises(SystemExit) as end:
        searched(tmp_path, runner, *batches)
    error = capsys.readouterr().err
    assert end.value.code == status and runner.ran == ran and error.count("error:") == 1 and said in error
    assert error.count(f": failed with status {status}\n    python -m train experiment=pair") == len(set(ran))


def test_a_search_without_its_store_runs_nothing(tmp_path, capsys):
    runner = Recording({})
    with pytest.raises(SystemExit) as end:
        searched(tmp_path, runner, [3])
    assert end.value.code == 2 and runner.ran == []
    assert capsys.readouterr().err.startswith(f"error: store={tmp_path / 'store'}: ")


def test_the_ends_of_an_interval_are_checked_and_only_a_search_draws_from_it():
    interval = "training.lr=tag(log,interval(1e-4,1e-2))"
    found = _members(["-m", "hydra/sweeper=search", interval])
    assert found == [["hydra/sweeper=search", "training.lr=0.0001"], ["hydra/sweeper=search", "training.lr=0.01"]]
    with pytest.raises(BadInput, match="Add hydra/sweeper=search"):
        _members(["-m", "experiment=demo", interval])


@pytest.mark.slow
def test_a_search_for_the_learning_rate_continues_where_it_was(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install -e '.[sweep]'")
    random_store(tmp_path / "store")
    search = ["hydra/sweeper=search", "training.lr=tag(log,interval(1e-4,1e-1))"]
    status, said = sweep(tmp_path, *search, "hydra.sweeper.n_trials=1")
    assert status == 0 and "1 of 1 members to run" in said, said
    status, said = sweep(tmp_path, *search, "hydra.sweeper.n_trials=2")
    assert status == 0 and "0 of 1 members to run" in said and "1 of 1 members to run" in said, said
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    values = {folder.name: objective(folder) for folder in (tmp_path / "runs").iterdir()}
    assert best.best_value == max(values.values()) and len(values) == 2
    assert f"lr={best.best_params['training.lr']}" in max(values, key=lambda name: values[name])


@pytest.mark.slow
def test_a_search_whose_runs_all_end_with_an_error_of_their_input_is_one_list(tmp_path):
    """Four at a time, of which some are equal; held-out tokens there are none."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install -e '.[sweep]'")
    random_store(tmp_path / "store")
    search = ["hydra/sweeper=search", "crosscoder.k=choice(3,4)", "hydra.sweeper.n_jobs=4"]
    status, said = sweep(tmp_path, *search, "data.heldout_fraction=1e-9")
    assert status == 2 and said.count("error: 4 trials gave this search nothing to choose by.") == 1, said
    assert "holds out none of the 40 documents" in said and "Traceback" not in said
    assert len(list((tmp_path / "sweeps").iterdir())) <= 2


def sweep(study: Path, *arguments: str) -> tuple[int, str]:
    """Status and output of a sweep over runs of ten steps."""
    command = [sys.executable, *train_arguments(study, 320), "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=290)
    return done.returncode, done.stdout
