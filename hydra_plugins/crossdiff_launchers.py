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
        self._ranks = ranks

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        check_command()
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from train.sweep import run_sweep
        from train.sweep_local import LocalRunner

        return run_sweep(self._config, job_overrides, LocalRunner(self._ranks))


class SlurmLauncher(Launcher):
    """Members as elements of a Slurm array; `options` are those of `train.sweep_slurm.SlurmOptions`."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        check_command()
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from train.sweep import run_sweep
        from train.sweep_slurm import SlurmOptions, SlurmRunner

        return run_sweep(self._config, job_overrides, SlurmRunner(SlurmOptions(**self._options)))


def check_command() -> None:
    """These launchers start `python -m train`: refused where another command is swept."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name != "train.__main__":
        raise CompactHydraException("error: This launcher is for `python -m train -m`. Leave hydra/launcher= out here.")
