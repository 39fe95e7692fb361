"""The sheet on which people do what the judge did: read a description, say whether the latent fires in a document."""

from __future__ import annotations

from pathlib import Path

from analysis.annotate.annotations import read_annotations
from analysis.config import AnalysisConfig
from analysis.examples.database import reading
from analysis.scoring.agreeing import judged_documents
from analysis.scoring.judging import unmarked
from analysis.scoring.people import ANSWERS, DOCUMENTS, quoted, told
from analysis.scoring.sheets import sample, write_sheet
from analysis.scoring.step import trials_of
from analysis.scoring.trials import DETECTION
from extract.errors import BadInput


def export_documents(sheet: Path, keys: Path, folders: list[Path], analysis: AnalysisConfig) -> int:
    """Writes the sheet of a random sample of the documents that the judge saw, and its key; returns its size.

    A row holds an id, the description and the excerpt that the judge had: no model, no latent, no truth, no verdict.
    """
    units = list(judged_documents(folders))
    if not units:
        raise BadInput("No document was judged. Score descriptions first: analysis.scoring.judge=MODEL.")
    key = sample(units, analysis.agreement.sample_size, analysis.agreement.seed)
    by_name = {folder.name: folder for folder in folders}
    descriptions = {(f.name, str(a.latent)): told(a) for f in folders for a in read_annotations(f)}
    rows = {
        identity: [descriptions[pair, latent], excerpt_of(by_name[pair], int(latent), int(document), analysis)]
        for identity, (pair, latent, document) in key.items()
    }
    write_sheet(sheet, ANSWERS[DOCUMENTS], ["description", "document"], rows, keys, key)
    return len(key)


def excerpt_of(folder: Path, latent: int, document: int, analysis: AnalysisConfig) -> str:
    """The part of a document that the judge saw: trials are drawn alike every time."""
    with reading(folder) as database:
        trials = trials_of(analysis, database, latent)[DETECTION]
    examples = {trial.example.document: trial.example for trial in trials}
    if document not in examples:
        raise BadInput(f"{folder / 'verdicts.csv'} is of other settings of analysis.scoring. Run the analysis again.")
    return quoted(unmarked(examples[document]), analysis.scoring.context_tokens)
