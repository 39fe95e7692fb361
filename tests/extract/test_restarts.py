"""A requeued job may start again as long as it gets further."""

import pytest

from extract.errors import BadInput
from extract.restarts import note_shards, note_start


def start(path, restart, progress, limit=3, job="12"):
    environment = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}
    note_start(path, progress, limit, f"step {progress} of run", environment)


def test_the_first_start_and_so_many_restarts_may_be_in_vain(tmp_path):
    path = tmp_path / "restarts.json"
    for restart in range(4):  # the start, and three restarts
        start(path, restart, progress=100)
    with pytest.raises(BadInput, match=r"Job 12 began 4 times at step 100 of run .*max_restarts_without_progress=3"):
        start(path, 4, progress=100)


def test_progress_begins_the_count_anew(tmp_path):
    path = tmp_path / "restarts.json"
    for restart in range(50):
        start(path, restart, progress=restart // 4)  # three restarts in vain, then some progress
    start(path, 50, progress=12)
    start(path, 51, progress=12)
    with pytest.raises(BadInput, match="Job 12 began 4 times"):
        start(path, 52, progress=12)


def test_no_restart_in_vain_is_allowed_with_a_limit_of_zero(tmp_path):
    path = tmp_path / "restarts.json"
    start(path, 0, progress=0, limit=0)
    start(path, 1, progress=5, limit=0)
    with pytest.raises(BadInput, match="began 1 times"):
        start(path, 2, progress=5, limit=0)


def test_a_start_that_is_noted_twice_counts_once(tmp_path):
    """The script that starts ranks asks first, then rank 0."""
    path = tmp_path / "restarts.json"
    for restart in range(4):
        start(path, restart, progress=0)
        start(path, restart, progress=0)
    with pytest.raises(BadInput, match="Job 12 began 4 times"):
        start(path, 4, progress=0)


def test_another_job_starts_from_none(tmp_path):
    path = tmp_path / "restarts.json"
    for restart in range(4):
        start(path, restart, progress=0)
    for restart in range(4):
        start(path, restart, progress=0, job="13")
    with pytest.raises(BadInput, match="Job 13 began 4 times"):
        start(path, 4, progress=0, job="13")


def test_nothing_is_noted_outside_of_slurm(tmp_path):
    note_start(tmp_path / "restarts.json", 0, 0, "step 0", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", '{"job": "12"}', '{"job": "12", "starts": [{"a": 1}]}'])
def test_a_record_that_cannot_be_read_is_begun_anew(tmp_path, content):
    path = tmp_path / "restarts.json"
    path.write_text(content)
    start(path, 9, progress=0, limit=0)
    with pytest.raises(BadInput):
        start(path, 10, progress=0, limit=0)


def test_workers_count_finished_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_PROCID", "0")
    folders = [tmp_path / name for name in ("base", "tuned")]
    for folder in folders:
        folder.mkdir()
    claims = tmp_path / "claims"
    for restart in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        note_shards(claims, folders, limit=0)
        (folders[restart % 2] / f"shard-0000{restart}.index").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    note_shards(claims, folders, limit=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    with pytest.raises(BadInput, match="4 finished shards"):
        note_shards(claims, folders, limit=0)


def test_the_first_worker_speaks_for_a_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_PROCID", "1")
    note_shards(tmp_path / "claims", [], limit=0)
    assert not list(tmp_path.iterdir())
