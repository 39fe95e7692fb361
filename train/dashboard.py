"""python -m train.dashboard experiment=STUDY[/PAIR] [local=true] [page=FILE]: the curves of a study's runs.

Saves a workspace with sections for training, sweeps, extraction and analysis to the W&B project tracking.project; run
again it updates the workspace. With local=true, for those without W&B or network, the same sections are drawn from the
runs' files into one HTML file, dashboard.html in the study's outputs; run it again to see how runs went on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from extract.command import run
    from extract.errors import BadInput
    from extract.publish import publish
    from train.config import TrainSettings


@dataclass
class DashboardSettings(TrainSettings):
    """The settings of training, and where to draw what it logged."""

    # Draw into an HTML file instead of saving a workspace to W&B.
    local: bool = False
    # That file; null = dashboard.html in `outputs`.
    page: str | None = None
    # Points of all curves of the page together, about: longer curves are thinned.
    max_points: int = 500_000

    def check(self) -> None:
        super().check()
        if self.max_points < 1:
            raise BadInput(f"max_points={self.max_points} must be at least 1.")
        if self.page is not None and not self.local:
            raise BadInput(f"page={self.page} is the file of the local page. Add local=true.")


def main(settings: DashboardSettings) -> None:
    if settings.local:
        print(f"page: {write_page(settings)}")
    else:
        print(f"workspace: {save_workspace(settings)}")


def write_page(settings: DashboardSettings) -> Path:
    """Writes the local page; where to. BadInput where that cannot be, or there is nothing to draw."""
    from train.dashboard_page import page_of, read_logs

    outputs = Path(settings.outputs)
    path = outputs / "dashboard.html" if settings.page is None else Path(settings.page)
    runs, extracted = read_logs(outputs, settings.pair, settings.max_points)
    page = page_of(settings.study, outputs, path.parent, runs, extracted)
    try:
        publish(path, page.encode())
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}). Name another file: page=FILE.") from error
    return path


def save_workspace(settings: DashboardSettings) -> str:
    """Saves the workspace to W&B; its URL. BadInput where its library is missing."""
    try:
        from train.dashboard_workspace import save
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "wandb_workspaces":
            raise
        raise BadInput(
            "A W&B workspace needs the package wandb-workspaces: pip install 'crossdiff[dashboard]' (or pip install "
            "wandb-workspaces). Without it: local=true draws the same panels from the runs' files."
        ) from error
    return save(settings)


if __name__ == "__main__":
    run(DashboardSettings, main)
