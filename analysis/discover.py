"""python -m analysis.discover experiment=STUDY [key=value ...]: a taxonomy from the descriptions of all models."""

from __future__ import annotations

from pathlib import Path

from extract.interrupts import one_line_interrupts, stops_interrupt

with one_line_interrupts():
    from analysis.config import AnalysisSettings
    from analysis.taxonomy.discovery import discover
    from extract.command import experiment_of, pairs_of, run
    from train.runs import run_folder


def main(settings: AnalysisSettings) -> None:
    """Discovers the taxonomy of a study whose pairs are annotated, and says how to use it."""
    settings.pair = None  # descriptions of all pairs, or none
    names = [run_folder(pair, experiment_of(pair)).name for pair in pairs_of(settings)]
    with stops_interrupt():
        path = discover(settings, [Path(settings.outputs) / "analysis" / name for name in names])
    print(f"taxonomy: {path}\nUse it with `python -m analysis ... analysis.taxonomy.path={path}`.")


if __name__ == "__main__":
    run(AnalysisSettings, main)
