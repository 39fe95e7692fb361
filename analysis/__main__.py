"""python -m analysis experiment=STUDY[/PAIR] [key=value ...]: the missing steps of the analysis of one pair or all."""

from __future__ import annotations

import warnings
from itertools import takewhile
from pathlib import Path

from extract.interrupts import one_line_interrupts, stops_interrupt

with one_line_interrupts():
    from omegaconf import OmegaConf

    from analysis.config import AnalysisSettings
    from analysis.latents.state import STATE_FILE
    from analysis.scoring.step import judge_of
    from analysis.steps import Step, is_current, run_steps, steps_of_pair, steps_of_study
    from analysis.taxonomy.step import DEFAULT, load_taxonomy, placer_of
    from analysis.tracking import track
    from extract.command import experiment_of, pairs_of, run
    from extract.publish import publish
    from extract.restarts import note_start
    from train.runs import run_folder, selected_pair


def main(settings: AnalysisSettings) -> None:
    with stops_interrupt():
        analyse(settings)


def analyse(settings: AnalysisSettings) -> None:
    """Analyses the selected pairs, then compares and reports all pairs of the study that are analysed."""
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    _note_start(settings)
    places = [(pair, *folders_of(pair)) for pair in pairs_of(settings)]
    # What one pair lacks is said before hours of work on another, and what the last step would refuse before the first.
    work = {folder: steps_of_pair(pair, crosscoder_folder, folder) for pair, crosscoder_folder, folder in places}
    load_taxonomy(Path(settings.analysis.taxonomy.path or DEFAULT))
    asking = _check_access(settings, work)
    for pair, _, folder in places:
        save_settings(pair, folder)
    any_done = False
    if asking:  # all that is free comes first: it tells what the rest of the study will cost
        from analysis.expenses import check_expenses  # loads a client that takes a second

        for folder, steps in work.items():
            free = list(takewhile(lambda step: step.name not in asking, steps))
            any_done |= run_steps(free, folder)
            work[folder] = steps[len(free) :]
        check_expenses(settings, list(work))
    for folder, steps in work.items():
        any_done |= run_steps(steps, folder)
    pair, _, folder = places[0]
    report_folder = Path(settings.outputs) / "report"
    save_settings(settings, report_folder)
    folders = analysed_folders(pair, folder)
    if run_steps(steps_of_study(settings, folders), report_folder) or any_done:
        track(settings, folders, report_folder)
    print(f"report: {report_folder / 'index.html'}")


def _note_start(settings: AnalysisSettings) -> None:
    """Of a requeued job; see `extract.restarts`."""
    outputs, limit = Path(settings.outputs), settings.max_restarts_without_progress
    records = [*outputs.glob("analysis/*/*.json"), *outputs.glob(f"analysis/*/*/*/{STATE_FILE}")]
    done = {path.stat().st_mtime_ns: path for path in records}
    newest = max(done, default=0)  # their number stays the same where steps are done again
    where = "its first step"
    if done:
        folder, _, name = str(done[newest].relative_to(outputs / "analysis").with_suffix("")).partition("/")
        where = f"the end of {folder}: {name}" if "/" not in name else f"a state of {folder}: latents"
    note_start(outputs / "report" / "restarts.json", newest, limit, where)


def _check_access(settings: AnalysisSettings, work: dict[Path, list[Step]]) -> set[str]:
    """The steps that may ask language models, none if nothing is to be done that leads to a question. BadInput, before
    hours of other work, for models that cannot be asked.
    """
    config, judge = settings.analysis, judge_of(settings.analysis)
    asked = {
        "annotate": config.llm.models if config.annotate.annotator == "llm" else [],
        "categorise": config.llm.models if placer_of(config) == "llm" else [],
        "score": [judge] if judge else [],
    }
    models = dict.fromkeys(model for names in asked.values() for model in names)
    leading = [(folder, step) for folder, steps in work.items() for step in steps if step.name in ("latents", *asked)]
    if not models or all(is_current(step, folder) for folder, step in leading):
        return set()
    from analysis.llm.preflight import check_access  # loads a client that takes a second

    check_access(config.llm, list(models))
    return {step for step, names in asked.items() if names}


def save_settings(settings: AnalysisSettings, folder: Path) -> None:
    """The composed settings beside what they lead to."""
    publish(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(settings)).encode())


def folders_of(settings: AnalysisSettings) -> tuple[Path, Path]:
    """The crosscoder of a pair, and the folder of its analysis, which has the name of the run."""
    run_of_pair = run_folder(settings, experiment_of(settings))
    return run_of_pair / "crosscoder", Path(settings.outputs) / "analysis" / run_of_pair.name


def analysed_folders(settings: AnalysisSettings, folder: Path) -> list[Path]:
    """The finished analyses of all pairs under the same overrides as `folder`, in the order of the study."""
    overrides = folder.name.removeprefix(selected_pair(settings))
    found = [folder.with_name(pair + overrides) for pair in settings.pairs]
    return [path for path in found if (path / "categorise.json").exists()]


if __name__ == "__main__":
    run(AnalysisSettings, main)
