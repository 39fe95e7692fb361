"""Bootstrap intervals of nu: what they cover on simulated documents, and what they do not claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.firings.config import IntervalsConfig
from analysis.latents.intervals import central, nu_intervals, resampled
from analysis.latents.scaling import ScalingSums, nu


def simulated(num_experiments: int, num_groups: int, per_group: int, seed: int) -> tuple[ScalingSums, torch.Tensor]:
    """Each latent is an experiment of its own: documents with random sums of a latent with rows (0, 1) in two models.

    A document of weight w, very unequal, has sum f^2 = w, error sums w (e + noise) for the other model and w noise for
    the focus. So nu_error towards the base is E[w e] / E[w (1 + ...)] = 0.3 by construction.
    """
    rng = np.random.default_rng(seed)
    sums = ScalingSums(num_experiments, 2, num_groups)
    sums_GLK = sums.sums_RK.view(num_groups, num_experiments, 9)
    shape = (num_groups, num_experiments, per_group)
    weight = rng.lognormal(0, 1, shape)
    other, own = 0.3 + rng.normal(0, 0.4, shape), rng.normal(0, 0.3, shape)
    sums_GLK[:, :, 0] = torch.from_numpy(weight.sum(2))
    # Columns: sum f^2, then error [focus, model] and recons [focus, model]; the focus is model 1.
    sums_GLK[:, :, 1 + 2] = torch.from_numpy((weight * other).sum(2))
    sums_GLK[:, :, 1 + 3] = torch.from_numpy((weight * own).sum(2))
    sums_GLK[:, :, 5 + 2] = torch.from_numpy((weight * (0.5 + rng.normal(0, 0.2, shape))).sum(2))
    sums_GLK[:, :, 5 + 3] = torch.from_numpy(weight.sum(2))
    gram_LMM = torch.tensor([[0.0, 0], [0, 1]], dtype=torch.float64).expand(num_experiments, 2, 2)
    return sums, gram_LMM


@pytest.mark.parametrize("per_group", [1, 20])
def test_intervals_cover_the_truth_about_as_often_as_they_say(per_group: int) -> None:
    """600 experiments at 90 %: a standard error of 1.2 points, and a percentile bootstrap is a little too short."""
    sums, gram = simulated(600, 64, per_group, seed=per_group)
    found = nu_intervals(sums, gram, IntervalsConfig(confidence=0.9, resamples=300))
    for measure, truth in ((0, 0.3), (1, 0.5)):
        low, high = found[:, measure, :, 1, 0]
        assert 0.83 <= ((low <= truth) & (truth <= high)).double().mean() <= 0.95
    nu_error, _ = nu(sums.total(), gram)
    assert ((found[0, 0, :, 1, 0] < nu_error[:, 1, 0]) & (nu_error[:, 1, 0] < found[1, 0, :, 1, 0])).all()


def test_an_interval_equals_resampling_one_latent_by_hand() -> None:
    sums, gram = simulated(3, 12, 4, seed=1)
    config = IntervalsConfig(resamples=40, confidence=0.8)
    found = nu_intervals(sums, gram, config)
    by_group = sums.sums_RK.view(12, 3, 9).numpy()
    drawn = np.random.default_rng(config.seed).integers(12, size=(40, 12))
    for j in range(3):
        values = []
        for groups in drawn:
            total = by_group[groups, j].sum(0)
            values.append(total[3] / (total[4] + total[0]))  # the latent's own part is added back: f^2 <d, d>
        np.testing.assert_allclose(found[:, 0, j, 1, 0], np.quantile(values, [0.1, 0.9]), rtol=1e-10)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, gram = simulated(7, 12, 4, seed=1)
    whole = nu_intervals(sums, gram, IntervalsConfig(resamples=40))
    monkeypatch.setattr("analysis.latents.intervals.CHUNK_VALUES", 40 * 9 * 2)
    torch.testing.assert_close(nu_intervals(sums, gram, IntervalsConfig(resamples=40)), whole, equal_nan=True)


def test_few_groups_and_zero_rows_have_no_interval() -> None:
    """Of nine groups resampling would say too little; a focus without a row has no nu."""
    sums, gram = simulated(2, 12, 1, seed=0)
    sums.sums_RK.view(12, 2, 9)[9:, 0] = 0
    found = nu_intervals(sums, gram, IntervalsConfig(resamples=50))
    assert found[:, :, 0].isnan().all()
    assert found[:, :, 1, 0].isnan().all() and found[:, :, 1, 1, 0].isfinite().all()


def test_resamples_draw_as_many_groups_as_there_are() -> None:
    weights = resampled(9, IntervalsConfig(resamples=30))
    assert weights.shape == (30, 9) and (weights.sum(1) == 9).all() and weights.std() > 0.5


def test_central_intervals_leave_out_what_is_not_finite() -> None:
    rows = np.array([[5.0, 1, 4, 2, 3], [np.nan, 2, np.inf, 1, np.nan], [np.nan] * 5])
    low, high = central(rows, 0.5)
    np.testing.assert_allclose(low, [2, 1.25, np.nan])
    np.testing.assert_allclose(high, [4, 1.75, np.nan])
