"""python -m train experiment=STUDY/PAIR [key=value ...]: train one crosscoder, or continue where it stopped."""

from __future__ import annotations

import logging

from hydra.core.hydra_config import HydraConfig

from extract.command import run
from train.config import TrainSettings
from train.runs import experiment_settings, run_folder
from train.trainer import train


def main(settings: TrainSettings) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    experiment = HydraConfig.get().runtime.choices["experiment"]
    crosscoder_folder = train(settings, run_folder(settings, experiment_settings(experiment)))
    print(f"crosscoder: {crosscoder_folder}")


if __name__ == "__main__":
    run(TrainSettings, main)
