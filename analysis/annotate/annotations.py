"""`annotations.jsonl`: what annotators say that latents respond to."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from analysis.damage import readable
from analysis.examples.wording import Evidence
from analysis.json_lines import json_text, lines_of
from extract.publish import publish

ANNOTATIONS = "annotations.jsonl"
ANNOTATOR = "offline (n-grams)"
MAX_LABEL_WORDS = 5
DESCRIBED, NO_DOCUMENTS = "described", "no documents"


@dataclass(frozen=True)
class Annotation:
    """One line: one vote on one latent. `label`, `description` and `pattern` are empty unless it is described."""

    latent: int
    owner: str
    label: str
    description: str
    confidence: str
    reason: str
    annotator: str
    num_documents: int
    evidence: tuple[Evidence, ...]
    fragments: tuple[str, ...]
    # 0 is the primary vote: the first annotator's first answer. Then its repeats, then the second annotator's.
    vote: int = 0
    repeat: int = 0
    # described | refused | truncated | invalid | failed (asked again by the next run) | no documents (none is stored).
    outcome: str = DESCRIBED
    pattern: str = ""
    # Tokens that a language model used, and the id of the question in requests.sqlite.
    usage: dict[str, int] = field(default_factory=dict)
    request: str = ""


def write_annotations(folder: Path, records: Iterable[Annotation]) -> None:
    """Publishes `annotations.jsonl`, whole or not at all."""
    lines = "".join(json_text(asdict(record)) + "\n" for record in records)
    publish(folder / ANNOTATIONS, lines.encode())


def read_annotations(folder: Path, votes: bool = False) -> list[Annotation]:
    """The primary vote on every latent of `annotations.jsonl`, described or not; all votes if `votes`."""
    path, records = folder / ANNOTATIONS, []
    with readable(path):
        lines = lines_of(path.read_bytes().decode("utf-8"))
    for number, line in enumerate(lines, 1):
        with readable(path, number):
            records.append(_annotation(json.loads(line)))
    return [record for record in records if votes or record.vote == 0]


def _annotation(record: dict) -> Annotation:
    evidence = tuple(Evidence(**entry) for entry in record["evidence"])
    return Annotation(**{**record, "evidence": evidence, "fragments": tuple(record["fragments"])})
