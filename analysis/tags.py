"""Evidence for planted behaviours: how well one latent of a model predicts a tag of the documents.

A document's score for a latent is the latent's maximum over the document's kept tokens (0 where it never fires).
Documents are split into two halves by a hash of their prompt, so that several models' answers to one prompt stay
together. The best latent and its threshold are chosen on one half; what is reported is measured on the other, with
intervals over prompts that have a width also where every prompt says the same (`interval_of`).

Shapes: n documents, m those of the measuring half, s distinct scores, R resamples.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.config import AnalysisSettings, TagsConfig
from analysis.examples.maxima import read_maxima
from analysis.latents.columns import owners_in_order
from extract.publish import publish
from extract.stores import TokenDocument, TokenStore
from train.runs import selected_pair


@dataclass(frozen=True)
class TagRow:
    """One row of `tags.csv`: the best latent of `owner` for a value of a tag, measured where it was not chosen.

    `latent` is None and the measures are nan if no latent of the owner fires on a tagged document of the choosing half,
    or if the measuring half lacks tagged or untagged documents. `num_positive`, `num_negative` count documents of the
    latter half, `num_positive_prompts`, `num_negative_prompts` their prompts, which are the units of the intervals.
    """

    tag: str
    value: str
    owner: str
    latent: int | None = None
    threshold: float = math.nan
    f1: float = math.nan
    f1_low: float = math.nan
    f1_high: float = math.nan
    auroc: float = math.nan
    auroc_low: float = math.nan
    auroc_high: float = math.nan
    num_positive: int = 0
    num_negative: int = 0
    found: bool = False
    num_positive_prompts: int = 0
    num_negative_prompts: int = 0


@dataclass(frozen=True)
class TaggedDocuments:
    """What is known of all documents (n,): the tag's value ("" without one), the number of the prompt, and the half."""

    value_n: np.ndarray
    prompt_n: np.ndarray
    chooses_n: np.ndarray


def write_tags(settings: AnalysisSettings, folder: Path) -> Path:
    """Writes `tags.csv` from `latents.parquet`, `document_maxima.parquet` and the tags of the documents.

    One row for every value of the tag `analysis.tags.name` and every model as owner, so that a behaviour that is
    attributed to the wrong model shows; with more than two models also every set of them that owns a latent. Only the
    heading if no document carries the tag.
    """
    config = settings.analysis.tags
    documents = read_documents(TokenStore(settings.tokens_folder), config.name)
    latents = pq.read_table(folder / "latents.parquet", columns=["latent", "owner"])
    values = sorted(set(documents.value_n.tolist()) - {""})
    models, rows = settings.pairs[selected_pair(settings)], []
    for owner in owners_in_order({*models, *latents["owner"].to_pylist()}, models) if values else []:
        scores = read_scores(folder / "document_maxima.parquet", owned_by(latents, owner), len(documents.value_n))
        best = best_scores(scores, values, documents)
        rows += [evidence(config, value, owner, best[value], documents) for value in values]
    path = folder / "tags.csv"
    publish(path, _csv(sorted(rows, key=lambda row: row.value)).encode())
    return path


def owned_by(latents: pa.Table, owner: str) -> list[int]:
    """The numbers of the latents of an owner, one model or a set of them."""
    owners, numbers = latents["owner"].to_pylist(), latents["latent"].to_pylist()
    return [latent for latent, own in zip(numbers, owners, strict=True) if own == owner]


def read_documents(tokens: TokenStore, tag: str) -> TaggedDocuments:
    """The tag's values, prompts and halves of all documents of a store."""
    values, prompts = [], []
    for document in tokens:
        value = document.tags.get(tag)
        values.append("" if value is None else str(value))
        prompts.append(_prompt_hash(document))
    _, prompt_n = np.unique(prompts, return_inverse=True)
    return TaggedDocuments(np.array(values), prompt_n, np.array([int(prompt[:8], 16) % 2 == 0 for prompt in prompts]))


def _prompt_hash(document: TokenDocument) -> str:
    """Hash of the first user message, or of the whole text if there is none."""
    for message in document.messages or []:
        if message["role"] == "user":
            return hashlib.sha256(message["content"].encode("utf-8", "surrogatepass")).hexdigest()
    return document.content_sha256


def read_scores(path: Path, latents: list[int], num_documents: int) -> Iterator[tuple[int, np.ndarray]]:
    """Scores (num_documents,) float32 of each latent in `latents` that fires anywhere, in ascending order."""
    wanted = set(latents)
    for latent, documents, maxima in read_maxima(path) if wanted else ():
        if latent in wanted:
            score_n = np.zeros(num_documents, dtype=np.float32)
            score_n[documents] = maxima
            yield latent, score_n


def best_scores(
    scores: Iterable[tuple[int, np.ndarray]], values: list[str], documents: TaggedDocuments
) -> dict[str, dict[int, np.ndarray]]:
    """Of every value the scores of the latent that `choose` takes, if there is one: scores of all are never held."""
    chooses_n = documents.chooses_n
    positive = {value: (documents.value_n == value)[chooses_n] for value in values}
    best: dict[str, dict[int, np.ndarray]] = {value: {} for value in values}
    best_f1 = dict.fromkeys(values, 0.0)
    for latent, score_n in scores:
        for value in values:
            f1, _ = best_f1_of(score_n[chooses_n], positive[value])
            if f1 > best_f1[value]:
                best_f1[value], best[value] = f1, {latent: score_n}
    return best


def evidence(
    config: TagsConfig, value: str, owner: str, scores: dict[int, np.ndarray], documents: TaggedDocuments
) -> TagRow:
    """The row of one value and one owner: choose on one half, measure on the other."""
    positive_n, chooses_n = documents.value_n == value, documents.chooses_n
    latent, threshold = choose({j: score_n[chooses_n] for j, score_n in scores.items()}, positive_n[chooses_n])
    positive_m, prompt_m = positive_n[~chooses_n], documents.prompt_n[~chooses_n]
    blank = _blank((config.name, value, owner), positive_m, prompt_m)
    if latent is None or not blank.num_positive or not blank.num_negative:
        return blank
    # In float64: the middle of two neighbouring float32 scores would round to one of them.
    score_m = scores[latent][~chooses_n].astype(np.float64)
    predicted_m, once_m = score_m > threshold, np.ones(len(score_m))
    _, level_m = np.unique(score_m, return_inverse=True)  # sorted once for all resamples
    f1, auroc = f1_of(predicted_m, positive_m, once_m), auroc_of(level_m, positive_m, once_m)
    f1_R, auroc_R = [], []
    for weight_m in resampled_weights(prompt_m, config.resamples, config.seed):
        f1_R.append(f1_of(predicted_m, positive_m, weight_m))
        auroc_R.append(auroc_of(level_m, positive_m, weight_m))
    further = with_further_prompts(score_m, positive_m, prompt_m, threshold, config.confidence)
    f1_low, f1_high = hull(percentiles(np.array(f1_R), config.confidence), [f1 for f1, _ in further])
    auroc_low, auroc_high = hull(percentiles(np.array(auroc_R), config.confidence), [auroc for _, auroc in further])
    return replace(
        blank,
        latent=latent,
        threshold=threshold,
        f1=f1,
        f1_low=f1_low,
        f1_high=f1_high,
        auroc=auroc,
        auroc_low=auroc_low,
        auroc_high=auroc_high,
        found=f1 >= config.min_f1,
    )


def _blank(named: tuple[str, str, str], positive_m: np.ndarray, prompt_m: np.ndarray) -> TagRow:
    """The row of (tag, value, owner) without a latent: what there would be to measure on."""
    return TagRow(
        *named,
        num_positive=int(positive_m.sum()),
        num_negative=int((~positive_m).sum()),
        num_positive_prompts=len(np.unique(prompt_m[positive_m])),
        num_negative_prompts=len(np.unique(prompt_m[~positive_m])),
    )


def choose(scores: dict[int, np.ndarray], positive_n: np.ndarray) -> tuple[int | None, float]:
    """The latent and threshold with the highest F1 here; ties go to the lower latent. (None, nan) if all are zero."""
    best, best_f1, best_threshold = None, 0.0, math.nan
    for latent in sorted(scores):
        f1, threshold = best_f1_of(scores[latent], positive_n)
        if f1 > best_f1:
            best, best_f1, best_threshold = latent, f1, threshold
    return best, best_threshold


def best_f1_of(score_n: np.ndarray, positive_n: np.ndarray) -> tuple[float, float]:
    """The best F1 of "score > threshold" over all thresholds >= 0, and the threshold: midway between two seen scores.

    A document on which the latent never fires is never predicted. (0, nan) if no threshold catches a positive.
    """
    fires_n = score_n > 0  # the others, nearly all, need no sorting
    if not (fires_n & positive_n).any():
        return 0.0, math.nan
    negated_s, inverse_f = np.unique(-score_n[fires_n], return_inverse=True)
    score_s = -negated_s
    predicted_s = np.bincount(inverse_f).cumsum()
    true_s = np.bincount(inverse_f, weights=positive_n[fires_n]).cumsum()
    f1_s = 2 * true_s / (predicted_s + positive_n.sum())
    best = int(f1_s.argmax())
    below = score_s[best + 1] if best + 1 < len(score_s) else 0.0
    return float(f1_s[best]), (float(score_s[best]) + float(below)) / 2


def f1_of(predicted_n: np.ndarray, positive_n: np.ndarray, weight_n: np.ndarray) -> float:
    """F1 = 2 TP / (predicted + positive) of documents that count `weight_n` times; nan if both counts are zero."""
    total = weight_n @ predicted_n + weight_n @ positive_n
    return float(2 * (weight_n @ (predicted_n & positive_n)) / total) if total else math.nan


def auroc_of(level_n: np.ndarray, positive_n: np.ndarray, weight_n: np.ndarray) -> float:
    """Probability that a positive outscores a negative, ties counting half; nan if one kind is missing.

    `level_n` numbers the distinct scores from 0, in ascending order.
    """
    positive_s = np.bincount(level_n, weights=weight_n * positive_n)
    negative_s = np.bincount(level_n, weights=weight_n * ~positive_n)
    beaten_s = negative_s.cumsum() - negative_s / 2
    total = positive_s.sum() * negative_s.sum()
    return float(positive_s @ beaten_s / total) if total else math.nan


def resampled_weights(prompt_n: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often every document counts in each bootstrap resample of whole prompts."""
    prompts, index_n = np.unique(prompt_n, return_inverse=True)
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = generator.integers(len(prompts), size=len(prompts))
        yield np.bincount(drawn, minlength=len(prompts))[index_n].astype(float)


def percentiles(values_R: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central interval of the resamples in which the measure exists; nan if there are none."""
    defined = values_R[~np.isnan(values_R)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def with_further_prompts(
    score_m: np.ndarray, positive_m: np.ndarray, prompt_m: np.ndarray, threshold: float, confidence: float
) -> list[tuple[float, float]]:
    """F1 and AUROC if there were z^2 further prompts, z being the normal quantile of `confidence`: tagged or untagged
    ones, all right or all wrong (the latent fires on them above everything, or not at all).

    A bootstrap knows only what it has seen: where n of n prompts are right, every resample is 1. Wilson's interval ends
    at n / (n + z^2) there, as if z^2 more had been wrong, and so does this for the Jaccard index J = F1 / (2 - F1).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    found = []
    for is_tagged in (True, False):
        kind_m = positive_m if is_tagged else ~positive_m
        weight = z**2 * kind_m.sum() / len(np.unique(prompt_m[kind_m]))
        for score in (0.0, math.inf):
            score_n, positive_n = np.append(score_m, score), np.append(positive_m, is_tagged)
            weight_n = np.append(np.ones(len(score_m)), weight)
            _, level_n = np.unique(score_n, return_inverse=True)
            f1 = f1_of(score_n > threshold, positive_n, weight_n)
            found.append((f1, min(1.0, auroc_of(level_n, positive_n, weight_n))))  # 1 + 2e-16 by rounding
    return found


def hull(interval: tuple[float, float], values: list[float]) -> tuple[float, float]:
    """The smallest interval that holds `interval`, whose ends may be nan, and all of `values`."""
    return float(np.nanmin([interval[0], *values])), float(np.nanmax([interval[1], *values]))


def _csv(rows: list[TagRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(TagRow)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()
