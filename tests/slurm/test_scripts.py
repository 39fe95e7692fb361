"""The scripts of slurm/ without Slurm: their syntax, and what they do on a machine of one's own.

A program of a few lines stands in for Python where what counts is how a process ends; the real one runs in the tests on
a real Slurm.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.stand_in import ROOT, script

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAIN = ("train_pt_it", "train_pt_simpo", "train_it_simpo", "train_pt_dpo")
SUBMITTED = ("tokens", "extract", "train", "analysis", *TRAIN)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", "-x", "-P", "..", path.name], cwd=path.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_there_is_a_script_for_every_job():
    assert {path.stem for path in SCRIPTS} == {
        "common",
        "ending",
        "pipeline",
        "site.example",
        "sweep_members",
        *SUBMITTED,
    }


@pytest.mark.parametrize("name", SUBMITTED)
def test_what_is_submitted_is_requeued_appends_to_its_log_and_hears_of_its_end(name):
    text = (ROOT / "slurm" / f"{name}.sh").read_text()
    asked = set(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120", f"--job-name={name}"} <= asked
    assert any(option.startswith("--output=%x-%") for option in asked)
    assert ("--array=0-3" in asked) == (name == "extract")


@pytest.mark.parametrize("name", TRAIN)
def test_each_pair_of_the_paper_has_its_script(name, environment):
    done = script(name, environment, "crosscoder.k=50")
    pair = name.removeprefix("train_")
    assert (
        f"rank alone of 1, local none, at none: -m train experiment=gemma2_9b/{pair} crosscoder.k=50\n" in done.stdout
    )
    assert done.returncode == 0 and done.stdout.endswith(f"{name}.sh: finished.\n")


@pytest.mark.parametrize(
    ("name", "module"), [("tokens", "extract.tokens"), ("extract", "extract.activations"), ("analysis", "analysis")]
)
def test_stages_take_another_study_from_an_argument_or_the_environment(name, module, environment):
    assert f"-m {module} experiment=gemma2_9b\n" in script(name, environment).stdout
    assert f"-m {module} experiment=demo\n" in script(name, environment, EXPERIMENT="demo").stdout
    assert f"-m {module} experiment=pair a=b\n" in script(name, environment, "experiment=pair", "a=b").stdout


def test_several_ranks_find_each_other_and_divide_the_latents(environment):
    done = script("train_pt_it", environment, RANKS_PER_NODE="3")
    ranks = sorted(re.findall(r"^rank (\d) of 3, local (\d), at 127.0.0.1: -m train (.*)$", done.stdout, re.MULTILINE))
    assert ranks == [(str(rank), str(rank), "experiment=gemma2_9b/pt_it engine=latent") for rank in range(3)]
    done = script("train_pt_it", environment, "engine=fsdp", RANKS_PER_NODE="2")
    assert done.stdout.count("experiment=gemma2_9b/pt_it engine=fsdp\n") == 2 and "latent" not in done.stdout
    done = script("train_pt_it", environment, "engine.timeout_s=20", RANKS_PER_NODE="2")
    assert done.stdout.count("experiment=gemma2_9b/pt_it engine.timeout_s=20 engine=latent\n") == 2


def test_workers_do_not_meet(environment):
    done = script("extract", environment, RANKS_PER_NODE="2", ACT='[ "$RANK" = 0 ] || sleep 0.3')
    assert done.stdout.count(" of 2,") == 2 and done.returncode == 0


@pytest.mark.parametrize(
    ("act", "status", "said"),
    [
        (
            "exit 2",
            2,
            '"error:" says which. Then: bash slurm/train_pt_it.sh a=b',
        ),
        ("exit 70", 70, "hung or died"),
        ("exit 75", 75, "stopped before the end; what was saved is kept. To continue: bash slurm/train_pt_it.sh a=b"),
        ("exit 1", 1, "a defect or a broken installation"),
        ("kill -9 $$", 137, "killed by signal 9"),
    ],
)
def test_the_last_line_says_what_happened_and_what_to_do(act, status, said, environment):
    done = script("train_pt_it", environment, "a=b", ACT=act)
    assert done.returncode == status and said in done.stdout.splitlines()[-1]


def test_the_worst_status_of_all_ranks_counts(environment):
    done = script("train_pt_it", environment, RANKS_PER_NODE="3", ACT="exit $((RANK == 1 ? 70 : 0))")
    assert done.returncode == 70


def test_nothing_runs_where_the_preflight_refuses(environment):
    done = script("train_pt_simpo", environment, RANKS_PER_NODE="2", PREFLIGHT="2")
    assert done.returncode == 2 and "rank" not in done.stdout
    assert "experiment=gemma2_9b/pt_simpo engine=latent gpus=2 gpus_per_node=2\n" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_whose_status_is_waited_for(number, environment, tmp_path):
    """Ranks take a second to save."""
    act = f'trap "sleep 1; exit 75" TERM; touch {tmp_path}/$RANK; while :; do sleep 0.1; done'
    own = {**environment, "RANKS_PER_NODE": "2", "ACT": act}
    command = ["bash", str(ROOT / "slurm" / "train_pt_it.sh")]
    process = subprocess.Popen(
        command,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell began with "&"
    )
    try:
        end = time.monotonic() + 30
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert time.monotonic() < end, "the ranks did not start"
            time.sleep(0.05)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75 and "hat was saved is kept" in said.splitlines()[-1]


@pytest.mark.parametrize("python", ["/usr/bin/false", "/nonexistent/python"])
def test_an_environment_without_the_package_is_one_message(python, environment):
    done = script("tokens", environment, PYTHON=python)
    assert done.returncode == 2 and done.stdout.count("error:") == 2  # and where the last line points to it
    assert f"error: {python} cannot run crossdiff" in done.stdout and "site.example.sh" in done.stdout


def test_what_a_python_lacks_is_named(environment, tmp_path):
    """The real interpreter, without its packages."""
    done = script("tokens", environment, PYTHON=_bare_python(tmp_path))
    assert done.returncode == 2 and re.search(r"lacks .*torch, transformers, hydra", done.stdout)


def _bare_python(folder: Path) -> str:
    path = folder / "bare"
    path.write_text(f'#!/usr/bin/env bash\nexec {shutil.which("python3")} -S -s -E "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_setup_that_fails_is_one_message(environment, tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("setup() { return 3; }\n")
    done = script("tokens", environment, CROSSDIFF_SITE=str(site))
    assert done.returncode == 2 and f"error: setup() of {site} failed with status 3." in done.stdout


def test_a_site_chooses_interpreter_container_and_staging(environment, tmp_path):
    wrapper = tmp_path / "container"
    wrapper.write_text('#!/usr/bin/env bash\necho "in the container" >&2\nexec "$@"\n')
    wrapper.chmod(0o755)
    site = tmp_path / "site.sh"
    python = environment.pop("PYTHON")
    site.write_text(f"setup() {{ PYTHON={python}; }}\nCONTAINER=({wrapper})\nSTAGING=/local/me\n")
    done = script("train_pt_it", environment, CROSSDIFF_SITE=str(site))
    assert done.returncode == 0 and "in the container" in done.stdout
    assert "-m train experiment=gemma2_9b/pt_it data.staging=/local/me\n" in done.stdout


def test_the_example_of_a_site_can_be_used_as_it_is(environment):
    done = script("tokens", environment, CROSSDIFF_SITE=str(ROOT / "slurm" / "site.example.sh"))
    assert done.returncode == 0, done.stdout


TOOLS = "basename bash cat date dirname env head mkdir nproc sed sort tail touch tr"


@pytest.fixture
def alone(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without Slurm, and a study of two pairs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS.split():
        (tools / name).symlink_to(shutil.which(name) or name)
    pairs = "pair a experiment=own/a\\npair b pair=b\\n" + f"outputs {tmp_path}/out\\n"
    return {**environment, "PATH": str(tools), "PAIRS": pairs}


def test_a_pipeline_without_slurm_runs_the_stages_one_after_another(alone):
    done = script("pipeline", alone, "experiment=own", "training.log_every=1", RANKS_PER_NODE="2")
    assert done.returncode == 0, done.stdout
    assert "preflight: -m train.preflight experiment=own training.log_every=1 gpus=2 gpus_per_node=2" in done.stdout
    stages = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("rank ")]
    both = "training.log_every=1 engine=latent"
    assert sorted(set(stages), key=stages.index) == [
        "-m extract.tokens experiment=own",
        "-m extract.activations experiment=own",
        f"-m train experiment=own/a {both}",
        f"-m train pair=b experiment=own {both}",
        "-m analysis experiment=own training.log_every=1",
    ]
    assert done.stdout.splitlines()[-1].endswith("pipeline.sh: finished.")


def test_a_stage_that_fails_here_ends_the_pipeline(alone):
    done = script("pipeline", alone, "experiment=own", ACT='[[ "$*" != *extract.act* ]] || exit 70')
    assert done.returncode == 70 and "-m train experiment" not in done.stdout
    assert "hung or died" in done.stdout and done.stdout.endswith(
        "to continue: bash slurm/pipeline.sh experiment=own\n"
    )


def test_members_of_a_sweep_divide_the_cpus_themselves(environment):
    says = 'echo "threads ${OMP_NUM_THREADS:-all}"'
    assert "threads all\n" in script("sweep_members", environment, "record.json", ACT=says).stdout
    assert "threads 3\n" in script("sweep_members", environment, "record.json", ACT=says, OMP_NUM_THREADS="3").stdout
    assert "threads all\n" not in script("train", environment, "experiment=a/b", ACT=says).stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "--nodes=2",
            "error: --nodes=2 is no setting. Options of sbatch come first: sbatch --nodes=2 slurm/train_pt_it.sh",
        ),
        ("gemma2_9b", "error: gemma2_9b is no setting. Settings are KEY=VALUE"),
    ],
)
def test_what_is_no_setting_is_refused(argument, said, environment):
    done = script("train_pt_it", environment, argument)
    assert done.returncode == 2 and said in done.stdout and "rank" not in done.stdout
