"""The analysis folders that a command over a whole study reads."""

from __future__ import annotations

from pathlib import Path

from analysis.config import AnalysisSettings
from extract.command import experiment_of, pairs_of
from extract.errors import BadInput
from train.runs import run_folder


def categorised_folders(settings: AnalysisSettings) -> list[Path]:
    """The folders of the study's pairs, or of the one that is chosen, whose latents are categorised. BadInput if none
    is.
    """
    names = [(pair, run_folder(pair, experiment_of(pair)).name) for pair in pairs_of(settings)]
    folders = [Path(pair.outputs) / "analysis" / name for pair, name in names]
    if found := [folder for folder in folders if (folder / "categories.csv").exists()]:
        return found
    raise BadInput(
        f"{settings.study} has no categories in {settings.outputs}. Run `python -m analysis "
        f"experiment={settings.study}` first."
    )


def categorised_beside(settings: AnalysisSettings, folders: list[Path]) -> list[Path]:
    """Those `folders` and, where one pair is chosen, the categorised ones of the study's other pairs under the same
    overrides, in the order of the study.
    """
    if settings.pair is None:
        return folders
    overrides = folders[0].name.removeprefix(settings.pair)
    beside = [folders[0].with_name(pair + overrides) for pair in settings.pairs]
    return [folder for folder in beside if (folder / "categories.csv").exists()]
