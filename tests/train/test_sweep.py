"""Sweeps on one machine: what is run, left out, named and handed back; the real command in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from planted import random_store, settings_of, train_arguments

from extract.command import _members, _of_sweep, compose, experiment_of
from extract.errors import BadInput
from extract.shards import write_activations
from train.config import TrainSettings
from train.runs import run_folder
from train.stops import EXIT_STOPPED, starting_deaf
from train.sweep import Member, group_of, is_finished, members_of, objective, status_text, summary
from train.sweep_local import PassedOn, environments, status_of_ranks
from train.trainer import train

ROOT = Path(__file__).parents[2]
D_MODEL = 6  # of planted.random_store


def config_of(*overrides: str) -> OmegaConf:
    """What Hydra tells a launcher of a sweep."""
    runtime = {"choices": {"hydra/sweeper": "basic"}}
    sweep = {"overrides": {"task": list(overrides)}, "sweeper": {"params": None}, "runtime": runtime}
    return OmegaConf.create({"hydra": sweep})


def test_members_have_runs_and_records_of_their_own_and_one_group(tmp_path):
    common = ["experiment=demo/base_simpo", f"outputs={tmp_path}"]
    config = config_of(*common, "crosscoder.k=5,6")
    first, second = members_of(config, [[*common, "crosscoder.k=5"], [*common, "crosscoder.k=6"]])
    assert (first.name, second.name) == ("base_simpo,k=5", "base_simpo,k=6")
    assert first.group == second.group == "demo/base_simpo over crosscoder.k"
    settings = compose(TrainSettings, first.overrides)  # as the process of the member composes them
    assert settings.tracking.group == first.group
    assert run_folder(settings, experiment_of(settings)) == first.folder == tmp_path / "runs" / "base_simpo,k=5"
    first.ended, first.job = "killed by SIGKILL", "12_0"
    first.record()
    assert first.record_file == tmp_path / "sweeps" / "base_simpo,k=5.json"
    again = Member.read(first.record_file)
    assert replace(again, settings=first.settings) == first and again.settings.crosscoder.k == 5
    assert second.recorded() == {} and second.recorded() != first.recorded()


def test_a_group_of_ones_own_is_kept():
    config = config_of("experiment=demo/base_simpo", "tracking.group=mine", "seed=0,1")
    members = members_of(config, [["experiment=demo/base_simpo", "tracking.group=mine", f"seed={n}"] for n in (0, 1)])
    assert [member.group for member in members] == ["mine", "mine"]
    assert members[0].overrides == ["experiment=demo/base_simpo", "tracking.group=mine", "seed=0"]


@pytest.mark.parametrize(
    ("swept", "group"),
    [
        ([], "demo/base_simpo"),
        (["crosscoder.k", "hookpoint"], "demo/base_simpo over crosscoder.k and hookpoint"),
        (["experiment"], "demo over experiment"),
    ],
)
def test_the_group_says_what_is_swept(swept, group):
    assert group_of(["seed=1", "experiment=demo/base_simpo"], swept, "demo") == group


def test_members_that_are_one_run_are_refused():
    common = ["experiment=demo/base_simpo"]
    with pytest.raises(BadInput, match=r"are one run, outputs/demo/runs/base_simpo: .*_every=5 and .*_every=6\. Sweep"):
        members_of(config_of(), [[*common, f"training.log_every={n}"] for n in (5, 6)])
    with pytest.raises(BadInput, match=r"are one run, outputs/demo/runs/base_simpo,k=5\. Sweep"):
        members_of(config_of(), [[*common, "crosscoder.k=5"]] * 2)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("hydra/launcher=slrm", "There are: basic, local, slurm."),
        ("hydra.launcher.rank=2", "Could not override 'hydra.launcher.rank'. Key 'rank' is not in struct."),
    ],
)
def test_a_wrong_choice_for_the_launcher_is_one_line(choice, said):
    (overrides,) = _members(_of_sweep(["-m", "experiment=demo/base_simpo", choice], "local"))
    with pytest.raises(BadInput) as error:
        compose(TrainSettings, overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_under_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="without torchrun"):
        members_of(config_of(), [["experiment=demo/base_simpo"]])


def test_finished_is_an_intact_crosscoder_of_these_settings_and_data(tmp_path):
    lengths = random_store(tmp_path / "store")
    settings, folder = settings_of(tmp_path), tmp_path / "run"
    assert not is_finished(settings, folder)
    train(settings, folder)
    assert is_finished(settings, folder)
    assert not is_finished(replace(settings, crosscoder=replace(settings.crosscoder, k=4)), folder)
    assert not is_finished(replace(settings, pairs={"base_tuned": ["tuned", "base"]}), folder)

    (tmp_path / "store" / "tokens" / "manifest.json").rename(tmp_path / "kept.json")
    assert is_finished(settings, folder)  # with a store that is not on this machine
    (tmp_path / "kept.json").rename(tmp_path / "store" / "tokens" / "manifest.json")
    shutil.copytree(tmp_path / "store" / "tokens", tmp_path / "other" / "tokens")
    write_noise(tmp_path / "other", lengths, settings.hookpoint)
    elsewhere = replace(settings, store=str(tmp_path / "other"))
    assert not is_finished(elsewhere, folder)

    assert_damage_is_seen(settings, folder)


def assert_damage_is_seen(settings: TrainSettings, folder: Path) -> None:
    """Also where the configuration has no hash of the weights, or another size than they have."""
    weights, config = (folder / "crosscoder" / name for name in ("crosscoder.safetensors", "config.json"))
    saved, described = weights.read_bytes(), json.loads(config.read_bytes())
    config.write_text(json.dumps({**described, "d_model": 2 * D_MODEL}))
    assert not is_finished(settings, folder)
    without_hash = json.dumps({name: value for name, value in described.items() if name != "sha256"})
    for text, may_differ in ((json.dumps(described), False), (without_hash, True)):
        config.write_text(text)
        assert is_finished(settings, folder)
        weights.write_bytes(saved[:-1])
        assert not is_finished(settings, folder)
        weights.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
        assert is_finished(settings, folder) == may_differ
        weights.write_bytes(saved)
    weights.unlink()
    assert not is_finished(settings, folder)


def write_noise(store: Path, lengths: list[int], hookpoint: str) -> None:
    """Activations of noise for both models, beside the tokens of a store."""
    for model in ("base", "tuned"):
        documents = ((f"{i:09d}", torch.randn(n, D_MODEL).bfloat16()) for i, n in enumerate(lengths))
        write_activations(store, model, hookpoint, documents, skip_first_tokens=1)


def test_the_objective_is_the_last_variance_explained_over_models(tmp_path):
    assert objective(tmp_path) is None
    lines = [
        {"step": 10, "val/variance_explained/base": 0.1, "val/variance_explained/tuned": 0.2},
        {"step": 20, "val/variance_explained/base": 0.5, "val/variance_explained/tuned": 0.75, "val/l0": 9.0},
        {"step": 21, "train/loss": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert objective(tmp_path) == 0.625
    path.write_text(json.dumps({"step": 30, "val/variance_explained/base": None, "val/variance_explained/tuned": 0.5}))
    assert objective(tmp_path) is None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "done"),
        (-9, "killed by SIGKILL"),
        (EXIT_STOPPED, "stopped and saved"),
        (2, "failed with status 2"),
    ],
)
def test_how_a_member_ended_in_words(status, words):
    assert status_text(status) == words


@pytest.mark.parametrize(("statuses", "status"), [([0, 0], 0), ([0, 2], 2), ([-9, 70], 70), ([0, -15], -15)])
def test_the_status_of_ranks_is_that_which_says_most(statuses, status):
    assert status_of_ranks(statuses) == status


def test_several_ranks_find_each_other():
    first, second = environments(2)
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"], second["LOCAL_RANK"]) == ("0", "1", "2", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and "RANK" not in environments(1)[0]


def test_signals_reach_the_processes_that_are_waited_for():
    """SIGUSR1 to this process: its child ends with 75, and the sweep knows that it was asked to stop."""
    code = "import signal, sys, os; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))"
    code += "; os.write(1, b'x'); signal.pause()"
    with PassedOn() as signals:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout and child.stdout.read(1) == b"x"
        killer = subprocess.Popen([sys.executable, "-c", f"import os; os.kill({os.getpid()}, {signal.SIGUSR1.value})"])
        assert signals.wait([child]) == [75] and signals.requested
        killer.wait()
        child.stdout.close()


def test_sigusr1_is_heard_by_one_that_listens_late_and_kills_none_that_saves_for_long(monkeypatch):
    """As slurm/ sends it, every 3 s, here faster: to a member that imports at first, and then saves for longer than
    StopRequest.AGAIN_S, after which a signal would act as usual.
    """
    monkeypatch.setattr("train.sweep_local.INSIST_S", 0.5)
    code = """
import os, sys, time
os.write(1, b"x")
from train.stops import AGAIN_S, StopRequest
with StopRequest() as stop:
    while not stop.requested:
        time.sleep(0.05)
    time.sleep(AGAIN_S + 1.5)
sys.exit(75)
"""
    sender = f"import os, signal, time\nfor _ in range(99):\n os.kill({os.getpid()}, signal.SIGUSR1); time.sleep(0.5)"
    with PassedOn() as signals:
        with starting_deaf():
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
        assert child.stdout and child.stdout.read(1) == b"x"
        killer = subprocess.Popen([sys.executable, "-c", sender])
        try:
            assert signals.wait([child]) == [75] and signals.requested
        finally:
            killer.kill()
            killer.wait()
            child.kill()
            child.stdout.close()


def test_a_summary_names_each_member_and_the_command_that_runs_it_alone():
    common = ["experiment=demo/base_simpo"]
    members = members_of(config_of(*common, "crosscoder.k=5,6"), [[*common, f"crosscoder.k={k}"] for k in (5, 6)])
    members[1].ended, members[1].log_file = "failed with status 2", "logs/sweep-1_1.log"
    assert summary(members, members[1:]).splitlines() == [
        "error: 1 of 2 members are not finished; the same command runs them again, or one alone:",
        "base_simpo,k=6: failed with status 2, see logs/sweep-1_1.log",
        "    python -m train experiment=demo/base_simpo crosscoder.k=6 "
        "'tracking.group=demo/base_simpo over crosscoder.k'",
    ]


def test_a_sweep_has_a_launcher_and_its_flag_first():
    assert _of_sweep(["a=1,2", "-m", "b=3"], "local") == ["-m", "a=1,2", "b=3", "hydra/launcher=local"]
    chosen = ["--multirun", "hydra/launcher=slurm", "a=1,2"]
    assert _of_sweep(chosen, "local") == ["-m", *chosen[1:]]
    assert _of_sweep(["a=1,2", "-m"], None) == ["-m", "a=1,2"] and _of_sweep(["a=1"], "local") == ["a=1"]


@pytest.mark.slow
def test_a_failed_member_is_named_while_others_go_on_and_a_finished_one_is_left_out(tmp_path):
    """Of two members that of block9 has no store; then there is one, and this member alone runs."""
    lengths = random_store(tmp_path / "store")
    status, said = sweep(tmp_path, "hookpoint=block9,block3")
    assert status == 1, said
    (finished,) = (tmp_path / "runs").glob("*/crosscoder/config.json")
    failure = said[said.index("error: 1 of 2 members are not finished") :]
    assert "hookpoint=block3" in str(finished) and "hookpoint=block9" in failure
    assert ": failed with status 2\n    python -m train experiment=pair" in failure
    written = finished.stat().st_mtime_ns
    write_noise(tmp_path / "store", lengths, "block9")
    status, said = sweep(tmp_path, "hookpoint=block9,block3")
    assert status == 0 and "1 of 2 members to run" in said, said
    assert finished.stat().st_mtime_ns == written
    assert len(list((tmp_path / "runs").glob("*/crosscoder/config.json"))) == 2


def sweep(study: Path, *arguments: str) -> tuple[int, str]:
    """Status and output of a sweep over runs of ten steps."""
    command = [sys.executable, *train_arguments(study, 320), "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=290)
    return done.returncode, done.stdout
