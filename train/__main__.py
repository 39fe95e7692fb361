"""python -m train experiment=STUDY/PAIR [key=value ...]: train one crosscoder, or continue where it stopped.

torchrun --nproc-per-node 8 -m train experiment=STUDY/PAIR engine=fsdp [key=value ...]      on several GPUs
python -m train -m experiment=STUDY/PAIR crosscoder.k=50,100 [hydra/launcher=slurm ...]     a sweep
"""

from __future__ import annotations

import logging
import os
import signal

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from extract.command import experiment_of, run
    from train.config import TrainSettings
    from train.ending import first_to_say
    from train.meeting import Place
    from train.runs import run_folder
    from train.stops import EXIT_STOPPED
    from train.sweep import objective
    from train.trainer import train


def main(settings: TrainSettings) -> float | None:
    """Trains; what a search over settings compares runs by."""
    rank = Place.of(os.environ).rank
    logging.basicConfig(format=f"[rank {rank}] %(message)s" if rank else "%(message)s")
    logging.getLogger("train").setLevel(logging.WARNING if rank else logging.INFO)
    try:
        crosscoder_folder = train(settings, run_folder(settings, experiment_of(settings)))
    except SystemExit as stopped:
        if stopped.code == EXIT_STOPPED:  # all is saved: a launcher that ends the others now gets the same status
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    if rank == 0:
        print(f"crosscoder: {crosscoder_folder}")
    return objective(crosscoder_folder.parent)


if __name__ == "__main__":
    run(TrainSettings, main, first_to_say, launcher="local")
