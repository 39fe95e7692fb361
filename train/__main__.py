"""python -m train experiment=STUDY/PAIR [key=value ...]: train one crosscoder, or continue where it stopped."""

from __future__ import annotations

import logging

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from extract.command import experiment_of, run
    from train.config import TrainSettings
    from train.runs import run_folder
    from train.trainer import train


def main(settings: TrainSettings) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    crosscoder_folder = train(settings, run_folder(settings, experiment_of(settings)))
    print(f"crosscoder: {crosscoder_folder}")


if __name__ == "__main__":
    run(TrainSettings, main)
