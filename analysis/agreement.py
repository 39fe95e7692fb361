"""How far the category of a latent depends on who gives it: repeats of one annotator, a second model, people.

    python -m analysis.agreement experiment=STUDY                             agreement.csv anew; of all pairs, printed
    python -m analysis.agreement experiment=STUDY export=sheet.csv            a blinded sample of latents to fill in
    python -m analysis.agreement experiment=STUDY filled=sheet.csv who=anna   the filled sheet: Cohen's kappa

With unit=documents the sheet holds descriptions and single documents, as the judge of detection had them.
agreement.csv stands in every analysis folder, and over the latents of all pairs together in outputs/STUDY/analysis,
with experiment=STUDY/PAIR too.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from analysis.config import AnalysisSettings
    from analysis.scoring.agreeing import people_folder, text_of, write_agreement
    from analysis.scoring.document_sheets import export_documents
    from analysis.scoring.people import ANSWERS, DOCUMENTS, LATENTS, add_said, export_latents, known_answers
    from analysis.scoring.sheets import check_new, read_sheet
    from analysis.scoring.votes import primary, read_votes
    from analysis.study_folders import categorised_beside, categorised_folders
    from analysis.taxonomy.categories import Category
    from analysis.taxonomy.step import DEFAULT, load_taxonomy
    from extract.command import run
    from extract.errors import BadInput


@dataclass
class AgreementSettings(AnalysisSettings):
    """The settings of `python -m analysis.agreement`."""

    # CSV to write, which is not there yet: a blinded random sample for people to judge; null writes none.
    export: str | None = None
    # CSV that a person filled in; null reads none.
    filled: str | None = None
    # Who filled it in: letters, digits, - and _.
    who: str | None = None
    # What a row of the sheet is: "latents" (which category?) or "documents" (does the description fit this one?).
    unit: str = LATENTS

    def check(self) -> None:
        super().check()
        if self.unit not in ANSWERS:
            raise BadInput(f'unit ({self.unit}) must be "{LATENTS}" or "{DOCUMENTS}".')
        if self.export and (self.filled or self.who):
            raise BadInput("export writes an empty sheet, filled (with who) reads one. Give one of them at a time.")
        if self.who and not self.filled:
            raise BadInput(f"who ({self.who}) says who filled in a sheet, and there is none: filled=FILE.")
        if self.export:
            check_new(Path(self.export))
        if self.filled and not re.fullmatch(r"[\w-]+", self.who or ""):
            raise BadInput(f"who ({self.who}) must name the person with letters, digits, - and _: who=anna.")


def main(settings: AgreementSettings) -> None:
    """Exports a sheet, or reads one, or neither; then agreement.csv."""
    folders = categorised_folders(settings)
    categories = load_taxonomy(Path(settings.analysis.taxonomy.path or DEFAULT))
    if settings.export:
        _export(settings, folders, categories)
        return
    if settings.filled:
        _import(settings, categories)
    for folder in folders:
        write_agreement(settings, [folder], folder)
    whole = categorised_beside(settings, folders)
    print(text_of(write_agreement(settings, whole, Path(settings.outputs) / "analysis")))


def _export(settings: AgreementSettings, folders: list[Path], categories: list[Category]) -> None:
    sheet, keys, analysis = Path(str(settings.export)), people_folder(settings, settings.unit), settings.analysis
    if settings.unit == DOCUMENTS:
        size = export_documents(sheet, keys, folders, analysis)
        print(f"{sheet}: {size} documents. Fill in the column `active` with yes or no.")
    else:
        votes = [vote.latent for folder in folders for vote in primary(read_votes(folder)) if vote.category]
        if not votes:
            raise BadInput("No latent of the study has a category, so there is nothing to agree on.")
        latents = [(pair, str(latent)) for pair, latent in votes]
        size = export_latents(sheet, keys, latents, folders[0].parent, categories, analysis.agreement)
        print(f"{sheet}: {size} of {len(latents)} latents. Fill in the column `category` with a name")
        print(f"of {sheet.with_suffix('.categories.csv')}.")
    again = [argument for argument in settings.composed_from if not argument.startswith("export=")]
    print(f"Then: {shlex.join(['python', '-m', 'analysis.agreement', *again, f'filled={sheet}', 'who=NAME'])}")


def _import(settings: AgreementSettings, categories: list[Category]) -> None:
    keys, known = people_folder(settings, settings.unit), known_answers(settings.unit, categories)
    filled = read_sheet(Path(str(settings.filled)), ANSWERS[settings.unit], known, keys)
    num_said = add_said(keys / f"{settings.who}.csv", filled)
    num_judged = sum(row.answer is not None for row in filled)
    print(f"{settings.who}: {num_judged} of {len(filled)} {settings.unit} are judged, {num_said} with earlier sheets")


if __name__ == "__main__":
    run(AgreementSettings, main)
