"""The step that tests descriptions on documents that their annotator did not see (arXiv 2410.13928).

A judge, a language model, reads a description and says of held-out documents whether the latent fires in them
(detection), or whether marks in them are where it does (fuzzing). Each question is put a second time with another
latent's description: what a judge can guess without the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

import numpy as np

from analysis.annotate.annotations import DESCRIBED, Annotation, read_annotations
from analysis.config import AnalysisConfig, AnalysisSettings
from analysis.examples.database import check_samples, reading
from analysis.llm.questions import Answer, Question
from analysis.scoring.agreeing import write_agreement
from analysis.scoring.judging import check_numbers, partners, question_of, verdicts_of
from analysis.scoring.scores import (
    NONE,
    SCORED,
    SCORES,
    SHUFFLED,
    SUMMARY,
    VERDICTS,
    Score,
    Verdict,
    balanced_accuracy,
    groups_of,
    read_scores,
    summarise,
    write_scores,
)
from analysis.scoring.trials import DETECTION, FUZZING, Given, Trial, detection, fuzzing, held_out

KINDS, CONTROLS = (DETECTION, FUZZING), (NONE, SHUFFLED)


@dataclass(frozen=True)
class Item:
    """One line to be of `scores.csv`. Where there is no question, `lacks` says why."""

    annotation: Annotation
    kind: str
    control: str
    given: list[Given]
    question: Question | None
    lacks: str


def judge_of(config: AnalysisConfig) -> str | None:
    """The model that judges descriptions; None where no model is asked."""
    return config.scoring.judge or (config.llm.model if config.annotate.annotator == "llm" else None)


def score(settings: AnalysisSettings, folder: Path) -> None:
    """scores.csv, score_summary.csv and verdicts.csv of an analysis folder where there is a judge; agreement.csv."""
    judge = judge_of(settings.analysis)
    if judge is None:
        for name in (SCORES, SUMMARY, VERDICTS):
            (folder / name).unlink(missing_ok=True)
        print(
            f"{folder.name}: descriptions are not scored: no language model is asked. "
            "analysis.scoring.judge=MODEL has these scored, analysis.annotate.annotator=llm has them written by one."
        )
    else:
        _score(settings, folder, judge)
    write_agreement(settings, [folder], folder)


def _score(settings: AnalysisSettings, folder: Path, judge: str) -> None:
    config, items = settings.analysis.scoring, items_of(settings, folder, read_annotations(folder), judge)
    answers = ask_judge(settings, items)
    scores = [score_of(item, answers, config.confidence) for item in items]
    verdicts = [row for item in items for row in verdicts_in(item, answers)]
    summaries = summarise(scores, groups_of(folder), config.confidence, config.resamples, config.seed)
    write_scores(folder, scores, summaries, verdicts)


def items_of(settings: AnalysisSettings, folder: Path, annotations: list[Annotation], judge: str) -> list[Item]:
    """What the judge is asked about each of the `annotations`, or why nothing."""
    described = [annotation for annotation in annotations if annotation.outcome == DESCRIBED]
    others = partners(described, groups_of(folder), settings.analysis.scoring.seed)
    asking = Asking(settings.analysis, folder.name, judge, others)
    with reading(folder) as database:
        check_samples(database, folder)
        return [item for annotation in annotations for item in asking.items_of(annotation, database)]


@dataclass(frozen=True)
class Asking:
    """What the questions about one crosscoder share; `others` are the descriptions that the controls are judged by."""

    analysis: AnalysisConfig
    pair: str
    judge: str
    others: Mapping[int, Annotation]

    def items_of(self, annotation: Annotation, database: Connection) -> list[Item]:
        """Four items: both kinds, each with the latent's own and with another description of the same documents."""
        trials = trials_of(self.analysis, database, annotation.latent)
        return [self._item(annotation, kind, control, trials[kind]) for kind in KINDS for control in CONTROLS]

    def _item(self, annotation: Annotation, kind: str, control: str, trials: list[Trial]) -> Item:
        told = annotation if control == NONE else self.others.get(annotation.latent)
        lacks = _lacks(annotation, told, trials)
        given = [trial.given for trial in trials]
        if lacks or told is None:
            return Item(annotation, kind, control, given, None, lacks)
        subject, context = f"{self.pair}/{annotation.latent}", self.analysis.scoring.context_tokens
        asked = question_of(subject, kind, told, trials, context, self.judge, self.analysis.llm)
        return Item(annotation, kind, control, given, asked, "")


def _lacks(annotation: Annotation, told: Annotation | None, trials: list[Trial]) -> str:
    """Why nothing can be asked, or nothing."""
    if annotation.outcome != DESCRIBED:
        return "not described"
    if len({trial.given.truth for trial in trials}) < 2:
        return "no documents"
    return "" if told else "no other description"


def trials_of(analysis: AnalysisConfig, database: Connection, latent: int) -> dict[str, list[Trial]]:
    """The trials of both kinds."""
    config = analysis.scoring
    material = held_out(database, latent, analysis.annotate.num_documents)
    rng = np.random.default_rng([config.seed, latent])
    return {
        DETECTION: detection(material, config.positives, config.negatives, rng),
        FUZZING: fuzzing(material, config.positives, config.negatives, rng, config.context_tokens),
    }


def ask_judge(settings: AnalysisSettings, items: list[Item]) -> dict[str, Answer]:
    """The answers by the ids of their questions; the detection questions first, since kinds share a cached prefix."""
    from analysis.llm.asking import ask  # loads a client that takes a second
    from analysis.llm.ledger import Ledger, ledger_path

    sizes = {item.question.id: len(item.given) for item in items if item.question}
    answers: dict[str, Answer] = {}
    with Ledger(ledger_path(settings.outputs)) as ledger:
        for kind in KINDS:
            questions = [item.question for item in items if item.question and item.kind == kind]
            found = ask(
                questions,
                lambda question, value: check_numbers(value, sizes[question.id]),
                settings.analysis.llm,
                ledger,
            )
            answers |= {answer.question: answer for answer in found}
    return answers


def score_of(item: Item, answers: Mapping[str, Answer], confidence: float) -> Score:
    """The line of an item."""
    truths = [given.truth for given in item.given]
    annotation, counts = item.annotation, (sum(truths), len(truths) - sum(truths))
    named = (annotation.latent, annotation.owner, annotation.annotator, item.kind, item.control)
    answer = answers[item.question.id] if item.question else None
    if answer is None or answer.value is None:
        nan = float("nan")
        return Score(*named, *counts, nan, nan, nan, answer.outcome if answer else item.lacks)
    value, (low, high) = balanced_accuracy(truths, verdicts_of(answer.value, item.kind), confidence)
    return Score(*named, *counts, value, low, high, SCORED)


def verdicts_in(item: Item, answers: Mapping[str, Answer]) -> list[Verdict]:
    """What the judge said of every document of an item; nothing where there is no answer."""
    answer = answers[item.question.id] if item.question else None
    if answer is None or answer.value is None:
        return []
    return [
        Verdict(item.annotation.latent, item.kind, item.control, given, verdict)
        for given, verdict in zip(item.given, verdicts_of(answer.value, item.kind), strict=True)
    ]


def has_failed_scores(folder: Path) -> bool:
    """Whether there are questions that no response came to, which another run asks again."""
    return any(score.outcome == "failed" for score in read_scores(folder))
