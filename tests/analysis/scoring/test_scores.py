"""Balanced accuracy by hand, intervals that cover the truth, summaries by owner, files that read back."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.compare.statistics import newcombe, wilson
from analysis.scoring.scores import (
    Score,
    Verdict,
    balanced_accuracy,
    mean_interval,
    read_scores,
    summarise,
    write_scores,
)
from analysis.scoring.trials import Given
from tests.analysis.messages_stub import MessagesStub
from tests.analysis.scoring.test_scoring import LATENTS, judge, make_folder, run


def line(latent: int, value: float, owner: str = "simpo", outcome: str = "scored", control: str = "none") -> Score:
    return Score(latent, owner, "m", "detection", control, 5, 5, value, value - 0.1, value + 0.1, outcome)


def test_balanced_accuracy_by_hand() -> None:
    # 3 of 4 positives and 1 of 2 negatives are right.
    truths = [True, True, True, True, False, False]
    verdicts = [True, True, True, False, False, True]
    value, interval = balanced_accuracy(truths, verdicts, 0.95)
    assert value == pytest.approx((0.75 + 0.5) / 2)
    # The difference of the true and the false positive rate is 2 * value - 1, and has Newcombe's interval.
    difference = newcombe(1, 2, 3, 4)
    assert (2 * interval.low - 1, 2 * interval.high - 1) == pytest.approx(tuple(difference))


def test_a_judge_that_says_yes_to_all_has_half() -> None:
    truths = [True] * 15 + [False] * 5
    assert balanced_accuracy(truths, [True] * 20, 0.95)[0] == 0.5
    value, interval = balanced_accuracy(truths, truths, 0.95)
    assert value == 1 and interval.high == 1 and 0.6 < interval.low < 0.95


@pytest.mark.parametrize(("positive_rate", "negative_rate"), [(0.5, 0.5), (0.9, 0.6), (0.97, 0.97)])
def test_intervals_of_one_question_cover_the_truth(positive_rate: float, negative_rate: float) -> None:
    rng = np.random.default_rng(1)
    truths, covered, trials = [True] * 10 + [False] * 10, 0, 2000
    for _ in range(trials):
        right = np.concatenate([rng.random(10) < positive_rate, rng.random(10) < negative_rate])
        verdicts = [truth == bool(r) for truth, r in zip(truths, right, strict=True)]
        interval = balanced_accuracy(truths, verdicts, 0.95)[1]
        covered += interval.low <= (positive_rate + negative_rate) / 2 <= interval.high
    assert covered / trials >= 0.93


def test_intervals_of_means_cover_the_truth_when_latents_come_in_groups() -> None:
    """40 groups of one to three latents, alike within a group: resampling latents singly would cover too rarely."""
    rng, covered, trials = np.random.default_rng(2), 0, 400
    for trial in range(trials):
        sizes = rng.integers(1, 4, 40)
        groups = np.repeat(np.arange(40), sizes)
        values = np.repeat(rng.choice([0.5, 0.8, 1.0], 40), sizes)
        interval = mean_interval(values, groups, resamples=300, seed=trial)
        covered += interval.low <= 2.3 / 3 <= interval.high
    # Four standard errors below .95, less what a percentile bootstrap of 40 groups lacks.
    assert 0.89 <= covered / trials <= 0.99


@pytest.mark.parametrize("num", [3, 10, 20])
def test_intervals_of_means_cover_the_truth_when_rare_values_are_not_seen(num: int) -> None:
    """One score in ten is low: of ten latents a third has none, and a bootstrap alone would cover 70 % of the time."""
    rng, covered, trials = np.random.default_rng(4), 0, 300
    values, shares = np.array([0.5, 0.9, 1.0]), [0.1, 0.3, 0.6]
    for trial in range(trials):
        interval = mean_interval(rng.choice(values, num, p=shares), np.arange(num), resamples=200, seed=trial)
        covered += interval.low <= values @ shares <= interval.high
    assert covered / trials >= 0.90  # four standard errors below .95


def test_equal_values_are_not_certain() -> None:
    low = wilson(10, 10).low
    assert tuple(mean_interval(np.ones(10), np.arange(10))) == pytest.approx((low, 1))
    assert tuple(mean_interval(np.full(10, 0.5), np.arange(10))) == pytest.approx((low / 2, 1 - low / 2))
    # Ten latents of one group are one.
    assert mean_interval(np.ones(10), np.zeros(10)).low == pytest.approx(wilson(1, 1).low)
    assert math.isnan(mean_interval(np.empty(0), np.empty(0)).low)


def test_summaries_leave_out_what_has_no_score() -> None:
    nan = float("nan")
    scores = [line(1, 0.9), line(2, 0.7), line(3, 0.5, "base"), line(4, nan, outcome="refused")]
    scores += [line(1, 0.5, control="shuffled"), line(5, nan, "dpo", "not described")]
    found = {(row.control, row.owner): row for row in summarise(scores, {}, 0.95, 200, 0)}
    assert found["none", "all"].num_latents == 3
    assert found["none", "all"].balanced_accuracy == pytest.approx(0.7)
    assert found["none", "simpo"].balanced_accuracy == pytest.approx(0.8)
    assert found["none", "simpo"].low <= 0.8 <= found["none", "simpo"].high
    assert found["shuffled", "all"].num_latents == 1
    assert found["none", "dpo"].num_latents == 0 and math.isnan(found["none", "dpo"].balanced_accuracy)


def test_near_duplicates_make_a_summary_less_certain() -> None:
    scores = [line(latent, [0.5, 0.9][latent % 2]) for latent in range(40)]
    apart = summarise(scores, {}, 0.95, 400, 0)[0]
    grouped = summarise(scores, {latent: latent % 8 for latent in range(40)}, 0.95, 400, 0)[0]
    assert (grouped.num_latents, grouped.balanced_accuracy) == (40, apart.balanced_accuracy)
    # Eight groups of five equal latents: sqrt(5) times as wide.
    assert grouped.high - grouped.low > 1.7 * (apart.high - apart.low)


def test_files_read_back_and_numbers_that_are_missing_are_empty(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == []
    scores = [line(1, 0.9), line(4, float("nan"), outcome="refused")]
    verdict = Verdict(1, "detection", "none", Given(17, "silent", None, False), True)
    write_scores(tmp_path, scores, summarise(scores, {}, 0.95, 100, 0), [verdict])
    assert (tmp_path / "scores.csv").read_text().splitlines()[2] == "4,simpo,m,detection,none,5,5,,,,refused"
    first, second = read_scores(tmp_path)
    assert first == scores[0] and math.isnan(second.balanced_accuracy) and second.outcome == "refused"
    lines = (tmp_path / "verdicts.csv").read_text().splitlines()
    assert lines == [
        "latent,kind,control,document,drawn,quantile,truth,verdict",
        "1,detection,none,17,silent,,False,True",
    ]


def test_the_step_takes_groups_from_the_latents_of_the_folder(tmp_path: Path) -> None:
    """All five descriptions score 1: how far that can be trusted depends on how many groups they are."""
    settings, folder = make_folder(tmp_path)
    with MessagesStub(answer=judge, local=True) as stub:
        for groups in ([1, 2, 3, 4, 5], [1, 1, 3, 4, 4]):
            columns = {"latent": list(LATENTS), "owner": list(LATENTS.values()), "group": groups}
            pq.write_table(pa.table(columns), folder / "latents.parquet")
            run(settings, folder, stub)
            with (folder / "score_summary.csv").open() as file:
                rows = {(row["kind"], row["control"], row["owner"]): row for row in csv.DictReader(file)}
            num = len(set(groups))
            assert float(rows["detection", "none", "all"]["low"]) == pytest.approx(wilson(num, num, 0.95).low)
