"""How `python -m train -m` runs the members of a sweep: here, one after another, or as elements of a Slurm array.

Hydra finds launchers in this package alone, and imports all of it with every command: what they do lies in `train`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn


class LocalLauncher(Launcher):
    """Members as processes of this machine, each of `ranks` ranks."""

    def __init__(self, ranks: int) -> None:
        from train.sweep_local import LocalRunner

        self._runner = LocalRunner(ranks)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from train.sweep import Sweep

        check_command()
        self._sweep = Sweep(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self._sweep.run(job_overrides, initial_job_idx, self._runner)


class SlurmLauncher(Launcher):
    """Members as elements of a Slurm array; what each asks for, `train.sweep_slurm.SlurmOptions` explains."""

    def __init__(
        self,
        nodes: int,
        ranks_per_node: int | None,
        gpus_per_node: int | None,
        time_min: int | None,
        partition: str | None,
        account: str | None,
        gpu: str,
        at_once: int,
        sbatch: dict[str, Any],
        wait: bool,
    ) -> None:
        from train.sweep_slurm import SlurmOptions, SlurmRunner

        asked = nodes, ranks_per_node, gpus_per_node, time_min, partition, account, gpu, at_once, sbatch, wait
        self._runner = SlurmRunner(SlurmOptions(*asked))

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from train.sweep import Sweep

        check_command()
        self._sweep = Sweep(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self._sweep.run(job_overrides, initial_job_idx, self._runner)


def check_command() -> None:
    """These launchers start `python -m train`: refused where another command is swept."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name != "train.__main__":
        raise CompactHydraException("error: This launcher is for `python -m train -m`. Leave hydra/launcher= out here.")
