"""`agreement.csv`: how far the category of a latent depends on who gives it, and the judge's verdicts on who judges."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from analysis.config import AnalysisSettings
from analysis.scoring.people import DOCUMENTS, LATENTS, NO, YES, answers_in, read_said
from analysis.scoring.raters import Bootstrap
from analysis.scoring.scores import NONE, groups_of, read_verdicts
from analysis.scoring.sheets import Named, as_csv
from analysis.scoring.trials import DETECTION
from analysis.scoring.votes import AgreementRow, Measure, Rater, agreement_of, read_votes, rows_with_people
from analysis.taxonomy.categories import OTHER
from analysis.taxonomy.step import DEFAULT, load_taxonomy
from extract.errors import BadInput
from extract.publish import publish

AGREEMENT = "agreement.csv"


def people_folder(settings: AnalysisSettings, unit: str) -> Path:
    """Where keys and answers of one kind of sheet are."""
    return Path(settings.outputs) / "analysis" / "people" / unit


def said_by_people(settings: AnalysisSettings) -> dict[str, Path]:
    """The files that `write_agreement` reads people's answers from, by their names in the record of a step."""
    units = (LATENTS, DOCUMENTS)
    return {f"people/{unit}/{path.name}": path for unit in units for path in answers_in(people_folder(settings, unit))}


def write_agreement(settings: AnalysisSettings, folders: Sequence[Path], target: Path) -> list[AgreementRow]:
    """agreement.csv over the latents of `folders` and their documents that were judged."""
    config, names = settings.analysis.agreement, {folder.name for folder in folders}
    categories = load_taxonomy(Path(settings.analysis.taxonomy.path or DEFAULT))
    group_of = {category.name: category.group for category in categories} | {OTHER: OTHER}
    bootstrap = Bootstrap(config.confidence, config.resamples, config.seed)
    votes = [vote for folder in folders for vote in read_votes(folder)]
    people = _said(people_folder(settings, LATENTS), names)
    _check_categories(people_folder(settings, LATENTS), people, set(group_of))
    by_latent = {who: {(named[0], int(named[1])): c for named, c in said.items()} for who, said in people.items()}
    clusters = {(folder.name, latent): group for folder in folders for latent, group in groups_of(folder).items()}

    def cluster_of(pair: str, latent: int) -> Hashable:
        return pair, clusters.get((pair, latent), latent)

    rows = agreement_of(votes, by_latent, group_of, bootstrap, lambda key: cluster_of(*key))
    readers = _said(people_folder(settings, DOCUMENTS), names)
    measure = Measure[Named](bootstrap, lambda named: cluster_of(named[0], int(named[1])))
    rows += rows_with_people("document", "judge", judged_documents(folders), readers, measure)
    columns = [field.name for field in fields(AgreementRow)]
    publish(target / AGREEMENT, as_csv(columns, [astuple(row) for row in rows]))
    return rows


def judged_documents(folders: Sequence[Path]) -> Rater[Named]:
    """What the judge said of every (pair, latent, document) of the detection questions, the controls left out."""
    return {
        (folder.name, str(verdict.latent), str(verdict.given.document)): YES if verdict.verdict else NO
        for folder in folders
        for verdict in read_verdicts(folder)
        if (verdict.kind, verdict.control) == (DETECTION, NONE)
    }


def _said(folder: Path, pairs: set[str]) -> dict[str, Rater[Named]]:
    """What every person said of units of these pairs, those who said nothing of them left out."""
    found = {
        who: {named: answer for named, answer in said.items() if named[0] in pairs}
        for who, said in read_said(folder).items()
    }
    return {who: said for who, said in found.items() if said}


def _check_categories(folder: Path, people: dict[str, Rater[Named]], categories: set[str]) -> None:
    for who, said in people.items():
        if unknown := {category for category in said.values() if category} - categories:
            raise BadInput(
                f"{folder / who}.csv is of another taxonomy: this one has no {min(unknown)!r}. Set "
                "analysis.taxonomy.path to that of the sheet, or remove the file."
            )


def text_of(rows: Sequence[AgreementRow]) -> str:
    """The rows for a terminal."""
    if not rows:
        return "No agreement to measure: one annotator, one repeat, and nobody's sheet. See analysis.llm.repeats."
    lines = [f"{'measure':<19} {'between':<40} {'level':<9} {'value':>6}  {'interval':<15} units"]
    for row in rows:
        interval = "unknown" if math.isnan(row.low) else f"{row.low:.2f} to {row.high:.2f}"
        shown = (
            f"{row.measure:<19} {row.between:<40} {row.level:<9} {row.value:>6.2f}  {interval:<15} {row.num_latents}"
        )
        lines.append(shown)
    return "\n".join(lines)
