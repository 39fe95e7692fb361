"""`scores.csv`, `score_summary.csv` and `verdicts.csv`: how well descriptions foretell where their latents fire.

balanced accuracy = (share of positives found + share of negatives found) / 2,      1/2 for a description of nothing
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from analysis.compare.statistics import Interval, wilson
from analysis.scoring.sheets import as_csv
from analysis.scoring.trials import Given
from extract.publish import publish

SCORES, SUMMARY, VERDICTS = "scores.csv", "score_summary.csv", "verdicts.csv"
SCORED = "scored"
# Whose description was judged: the latent's own, or another latent's.
NONE, SHUFFLED = "none", "shuffled"
ALL = "all"


@dataclass(frozen=True)
class Score:
    """One line of `scores.csv`: one question about one description. Numbers are NaN unless `outcome` is "scored".

    `kind` is detection or fuzzing; `control` is "none", or "shuffled" where another latent's description was judged.
    The other outcomes: refused, truncated, invalid, failed (the judge gave no answer), "not described", "no documents"
    (nothing is held out), "no other description" (for the control).
    """

    latent: int
    owner: str
    annotator: str
    kind: str
    control: str
    num_positive: int
    num_negative: int
    balanced_accuracy: float
    low: float
    high: float
    outcome: str


@dataclass(frozen=True)
class Summary:
    """One line of `score_summary.csv`: the mean over the scored latents of one owner, or of all."""

    kind: str
    control: str
    owner: str
    num_latents: int
    balanced_accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """One line of `verdicts.csv`: what was said of one document of a question."""

    latent: int
    kind: str
    control: str
    given: Given
    verdict: bool

    def cells(self) -> list[object]:
        """The line."""
        return [self.latent, self.kind, self.control, *astuple(self.given), self.verdict]


def balanced_accuracy(truths: Sequence[bool], verdicts: Sequence[bool], confidence: float) -> tuple[float, Interval]:
    """The balanced accuracy of one question with its interval; both truths must occur.

    The interval of half a sum of two shares p and q with Wilson limits (l, u) is that of Newcombe (1998) for sums:

        (p + q)/2 - sqrt((p - l_p)^2 + (q - l_q)^2)/2  to  (p + q)/2 + sqrt((u_p - p)^2 + (u_q - q)^2)/2
    """
    pairs = list(zip(truths, verdicts, strict=True))
    shares, limits = [], []
    for truth in (True, False):
        right = [verdict == truth for given, verdict in pairs if given == truth]
        shares.append(sum(right) / len(right))
        limits.append(wilson(sum(right), len(right), confidence))
    centre = sum(shares) / 2
    below = math.hypot(*(share - limit.low for share, limit in zip(shares, limits, strict=True))) / 2
    above = math.hypot(*(limit.high - share for share, limit in zip(shares, limits, strict=True))) / 2
    return centre, Interval(centre - below, centre + above)


def groups_of(folder: Path) -> dict[int, int]:
    """The group of near-duplicates that every latent of an analysis folder belongs to; {} in an older folder."""
    if "group" not in pq.read_schema(folder / "latents.parquet").names:
        return {}
    table = pq.read_table(folder / "latents.parquet", columns=["latent", "group"])
    return dict(zip(table["latent"].to_pylist(), table["group"].to_pylist(), strict=True))


def summarise(
    scores: Iterable[Score], group_of: Mapping[int, int], confidence: float, resamples: int, seed: int
) -> list[Summary]:
    """The mean by kind, control and owner, and over all owners, with bootstrap intervals over groups of latents."""
    found: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        for owner in (ALL, score.owner):
            rows = found.setdefault((score.kind, score.control, owner), [])
            rows += [score] if score.outcome == SCORED else []
    summaries = []
    for (kind, control, owner), rows in found.items():
        values = np.array([row.balanced_accuracy for row in rows])
        groups = np.array([group_of.get(row.latent, row.latent) for row in rows], dtype=np.int64)
        mean = float(values.mean()) if len(values) else float("nan")
        interval = mean_interval(values, groups, confidence, resamples, seed)
        summaries.append(Summary(kind, control, owner, len(rows), mean, *interval))
    return summaries


def mean_interval(
    values: np.ndarray, groups: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of values in [0, 1] over clusters: the values of one group are drawn together.

    A bootstrap knows only what it has seen, and of few groups that is little. The interval therefore holds the means
    with z^2 further groups too, z being the normal quantile, that are all 0 or all 1: as Wilson's interval, which ends
    at n / (n + z^2) where n of n groups are 1.
    """
    if not len(values):
        return Interval(float("nan"), float("nan"))
    _, group_of = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group_of, values), np.bincount(group_of)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile((times @ sums) / (times @ sizes), [tail, 1 - tail])
    known = wilson(len(sizes), len(sizes), confidence).low
    lowest = known * float(values.mean())
    return Interval(min(float(low), lowest), max(float(high), lowest + 1 - known))


def write_scores(folder: Path, scores: list[Score], summaries: list[Summary], verdicts: list[Verdict]) -> None:
    """The three files; numbers that there are not are empty."""
    columns = ["latent", "kind", "control", *_names(Given), "verdict"]
    _write(folder / VERDICTS, columns, [row.cells() for row in verdicts])
    _write(folder / SUMMARY, _names(Summary), [list(astuple(row)) for row in summaries])
    _write(folder / SCORES, _names(Score), [list(astuple(row)) for row in scores])


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _write(path: Path, columns: list[str], rows: list[list[object]]) -> None:
    publish(path, as_csv(columns, [[_cell(value) for value in row] for row in rows]))


def _cell(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def read_scores(folder: Path) -> list[Score]:
    """The lines of `scores.csv`; none where nothing was scored."""
    if not (folder / SCORES).exists():
        return []
    with (folder / SCORES).open(encoding="utf-8", newline="") as file:
        return [_parse(row) for row in csv.DictReader(file)]


def _parse(row: Mapping[str, str]) -> Score:
    value, low, high = (float(row[name] or "nan") for name in ("balanced_accuracy", "low", "high"))
    return Score(
        latent=int(row["latent"]),
        owner=row["owner"],
        annotator=row["annotator"],
        kind=row["kind"],
        control=row["control"],
        num_positive=int(row["num_positive"]),
        num_negative=int(row["num_negative"]),
        balanced_accuracy=value,
        low=low,
        high=high,
        outcome=row["outcome"],
    )


def read_verdicts(folder: Path) -> list[Verdict]:
    """The lines of `verdicts.csv`; none where nothing was scored."""
    if not (folder / VERDICTS).exists():
        return []
    with (folder / VERDICTS).open(encoding="utf-8", newline="") as file:
        return [_parse_verdict(row) for row in csv.DictReader(file)]


def _parse_verdict(row: Mapping[str, str]) -> Verdict:
    quantile = int(row["quantile"]) if row["quantile"] else None
    given = Given(int(row["document"]), row["drawn"], quantile, row["truth"] == "True")
    return Verdict(int(row["latent"]), row["kind"], row["control"], given, row["verdict"] == "True")
