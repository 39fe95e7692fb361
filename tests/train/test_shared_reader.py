"""Sweeps whose members share a reader, as processes: killed, stopped, continued; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planted import random_store, train_arguments
from safetensors.torch import load_file

from extract.command import compose, experiment_of
from train.config import TrainSettings
from train.ending import EXIT_HANG
from train.runs import run_folder
from train.shared_reader import LOG_FILE, _waves, data_key, last_line, part_of_cores
from train.stops import EXIT_STOPPED
from train.sweep import Member

ROOT = Path(__file__).resolve().parents[2]
# A sweep as a process of its own: what it is told are the members' command lines, what it prints are their statuses.
SWEEP = """
import json, logging, signal, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as slurm/ starts it
from extract.command import compose, experiment_of
from train.config import TrainSettings
from train.runs import run_folder
from train.shared_reader import run_members
from train.sweep import Member
from train.sweep_local import PassedOn

logging.basicConfig(format="%(message)s", level=logging.INFO)
members = []
for overrides in json.loads(sys.argv[1]):
    settings = compose(TrainSettings, overrides)
    members.append(Member(overrides, settings, run_folder(settings, experiment_of(settings)), "group"))
with PassedOn() as signals:
    print(json.dumps(run_members(members, signals)))
"""


def member_of(overrides):
    settings = compose(TrainSettings, overrides)
    return Member(overrides, settings, run_folder(settings, experiment_of(settings)), "group")


@pytest.fixture
def study(tmp_path):
    random_store(tmp_path / "store")
    return tmp_path


def overrides_of(study, num_steps, *others):
    return [*train_arguments(study, 32 * num_steps)[2:], "training.validate_every=0", *others]


def over_k(study, num_steps):
    return [member_of(overrides_of(study, num_steps, f"crosscoder.k={k}")) for k in (2, 3, 4)]


@contextlib.contextmanager
def sweep(members):
    """A sweep in a process group of its own, all of which is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, json.dumps([member.overrides for member in members])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *processes_of(members)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def statuses(process):
    """Of the members, and what the sweep said."""
    said, errors = process.communicate(timeout=200)
    return json.loads(said), errors


def processes_of(members, name="train"):
    """Ids of the members' processes, or of their readers', by their command lines."""
    outputs, found = f"outputs={members[0].settings.outputs}", []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if name in words and outputs in words:
                found.append(int(folder.name))
    return found


def wait_for_steps(members, number, process):
    """Until each member has done so many steps."""
    while any(len(steps_of(member)) < number for member in members):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def steps_of(member):
    path = member.folder / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines(True) if line[-1] == "\n"]
        if path.exists()
        else []
    )


def log_of(member):
    return (member.folder / LOG_FILE).read_text()


def weights_of(member):
    return load_file(member.folder / "crosscoder" / "crosscoder.safetensors")


def assert_alone_is_the_same(member, tmp_path):
    """Its crosscoder is, bit for bit, that of the same command without a sweep."""
    outputs = tmp_path / "alone"
    overrides = [*member.overrides, f"outputs={outputs}", f"store={member.settings.store}"]
    subprocess.run([sys.executable, "-m", "train", *overrides], cwd=ROOT, check=True, capture_output=True)
    found, expected = weights_of(member), weights_of(member_of(overrides))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_continues_and_gives_what_each_member_gives_alone(study, tmp_path):
    """Two members share, at other k; a third, of another seed, reads for itself."""
    members = [*over_k(study, 300)[:2], member_of(overrides_of(study, 300, "seed=5"))]
    with sweep(members) as process:
        wait_for_steps(members, 20, process)
        process.send_signal(signal.SIGTERM)
        found, said = statuses(process)
        assert found == [EXIT_STOPPED] * 3, said
        assert processes_of(members, "train.reader") == []
    assert all(len(steps_of(member)) < 300 for member in members)
    with sweep(members) as process:
        found, said = statuses(process)
    assert found == [0, 0, 0], said
    for member in members[:2]:
        assert log_of(member).count("One process reads the store for 2 members") == 2
        assert_alone_is_the_same(member, tmp_path)
    assert "One process reads" not in log_of(members[2])
    assert f"{members[2].name} reads the store for itself: no other that runs now has the same data settings" in said
    assert f"{members[0].name}: done; crosscoder: {members[0].folder}" in said


@pytest.mark.slow
def test_a_member_that_is_killed_leaves_the_others_as_they_are(study, tmp_path):
    members = over_k(study, 400)
    with sweep(members) as process:
        wait_for_steps(members, 10, process)
        victim = int(log_pid(process, members[1]))
        os.kill(victim, signal.SIGKILL)
        found, said = statuses(process)
        assert found == [0, -signal.SIGKILL, 0], said
    assert "error" not in log_of(members[0]).lower()
    assert_alone_is_the_same(members[2], tmp_path)


@pytest.mark.slow
def test_a_reader_that_is_killed_is_one_error_of_each_member_and_costs_no_step(study, tmp_path):
    members = over_k(study, 2000)[:2]
    with sweep(members) as process:
        wait_for_steps(members, 25, process)
        (reader,) = processes_of(members, "train.reader")
        os.kill(reader, signal.SIGKILL)
        found, said = statuses(process)
        assert found == [EXIT_HANG, EXIT_HANG], said
    for member in members:
        log = log_of(member)
        assert log.count("error:") == 1 and "Traceback" not in log
        assert "error: The process that reads for the members of this sweep was killed." in log
        last = max(int(path.name[5:]) for path in (member.folder / "checkpoints").iterdir())
        assert last == steps_of(member)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 10])
def test_sigusr1_to_all_processes_until_they_end_is_one_request(study, num_steps):
    """As srun passes it on to a job, while processes start and while they train."""
    members = over_k(study, 100_000)[:2]
    with sweep(members) as process:
        while not processes_of(members, "train.reader"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        wait_for_steps(members, num_steps, process)
        while process.poll() is None:
            for pid in [process.pid, *processes_of(members), *processes_of(members, "train.reader")]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
            time.sleep(0.5)
        found, said = statuses(process)
    if num_steps == 0:  # what has only just been started may be ended at once
        assert set(found) <= {EXIT_STOPPED, -signal.SIGTERM}, said
        return
    assert found == [EXIT_STOPPED] * 2, said
    for member in members:
        last = max(int(path.name[5:]) for path in (member.folder / "checkpoints").iterdir())
        assert last == steps_of(member)[-1] >= num_steps


@pytest.mark.slow
def test_nothing_is_left_where_the_sweep_itself_is_killed(study):
    before, members = set(Path("/dev/shm").iterdir()), over_k(study, 100_000)[:2]
    with sweep(members) as process:
        wait_for_steps(members, 10, process)
        process.kill()
        end_at = time.monotonic() + 60
        while processes_of(members) or processes_of(members, "train.reader"):
            assert time.monotonic() < end_at
            time.sleep(0.2)
    assert all("for the members of this sweep failed: what started it was killed" in log_of(each) for each in members)
    assert {path.name for path in set(Path("/dev/shm").iterdir()) - before if "crossdiff" in path.name} == set()


def log_pid(process, member):
    """The process that the sweep says a member is."""
    for line in process.stderr:
        if line.startswith(f"{member.name} runs as process "):
            return line.split("process ")[1].split(" and ")[0]
    raise AssertionError("the sweep does not say it")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("crosscoder.k=4", True),
        ("training.lr=0.1", True),
        ("crosscoder.num_latents=64", True),
        ("crosscoder.activation_scaling=none", True),
        ("training.num_tokens=6400", True),
        ("data.max_validation_tokens=10", True),
        ("seed=1", False),
        ("training.num_tokens_per_step=16", False),
        ("data.shuffle_window=4", False),
        ("data.heldout_fraction=0.3", False),
        ("kept.skip_first_tokens=2", False),
        ("hookpoint=block4", False),
        ("store=/elsewhere", False),
    ],
)
def test_which_members_have_the_same_batches(tmp_path, override, same):
    first, second = (compose(TrainSettings, overrides_of(tmp_path, 100, *each)) for each in ((), (override,)))
    assert (data_key(first) == data_key(second)) == same


def test_members_of_the_same_data_run_at_a_time(tmp_path):
    seeds = [0, 1, 0, 1, 2, 0]
    members = [member_of(overrides_of(tmp_path, 100, f"seed={s}", f"crosscoder.k={k}")) for k, s in enumerate(seeds, 1)]
    assert list(_waves(members, 6)) == [[0, 2, 5, 1, 3, 4]]
    assert list(_waves(members, 2)) == [[0, 2], [5, 1], [3, 4]]


def test_members_divide_the_cores_also_where_the_environment_says_those_of_the_node(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    monkeypatch.setattr("torch.get_num_threads", lambda: 12)  # as torch takes it from there when it is imported
    assert [part_of_cores(n)["OMP_NUM_THREADS"] for n in (1, 4, 5, 13)] == ["12", "3", "2", "1"]


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    assert last_line(log) == "it said nothing"
    log.write_text("error: one\n  5%|#\r 10%|##\rerror: two\n\n")
    assert last_line(log) == "error: two"
