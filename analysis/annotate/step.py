"""The step that describes every model-specific latent, offline or by a language model."""

from pathlib import Path

import pyarrow.parquet as pq

from analysis.annotate.annotations import ANNOTATIONS, read_annotations, write_annotations
from analysis.annotate.offline import describe_offline
from analysis.config import NOT_MODELS, AnalysisSettings
from analysis.examples.database import check_samples, reading


def annotate(settings: AnalysisSettings, folder: Path) -> None:
    """Describe every model-specific latent of an analysis folder -> `annotations.jsonl`, whole or not at all."""
    config = settings.analysis.annotate
    owned = owned_of(folder)
    with reading(folder) as database:
        if config.annotator == "llm":
            check_samples(database, folder)  # what descriptions are scored with, before any is paid for
            from analysis.annotate.describing import describe_by_llm  # loads a client that takes a second

            records = describe_by_llm(settings, folder.name, database, owned)
        else:
            records = describe_offline(database, owned, config)
    write_annotations(folder, records)


def owned_of(folder: Path) -> list[tuple[int, str]]:
    """The model-specific latents of an analysis folder, each with its owner."""
    latents = pq.read_table(folder / "latents.parquet", columns=["latent", "owner"]).to_pylist()
    return [(row["latent"], row["owner"]) for row in latents if row["owner"] not in NOT_MODELS]


def has_failed(folder: Path) -> bool:
    """Whether there are questions that no response came to, which another run asks again."""
    if not (folder / ANNOTATIONS).exists():
        return False
    return any(record.outcome == "failed" for record in read_annotations(folder, votes=True))
