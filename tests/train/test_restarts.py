"""Training jobs that are requeued: what counts as progress is the newest checkpoint."""

import pytest

from extract.command import compose
from extract.errors import BadInput
from train.config import TrainSettings
from train.restarts import note_run_start


def test_a_checkpoint_is_progress(tmp_path):
    settings = compose(TrainSettings, ["experiment=demo/base_simpo", "max_restarts_without_progress=1"])

    def start(restart):
        note_run_start(settings, tmp_path, {"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": str(restart)})

    start(0)
    start(1)
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000040.1234.partial").mkdir()  # not published
    start(2)
    start(3)
    with pytest.raises(BadInput, match=rf"Job 3 began 2 times at step 20 of {tmp_path}"):
        start(4)
    (tmp_path / "checkpoints" / "step-00000040").mkdir()
    start(5)
