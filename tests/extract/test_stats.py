import math

import pytest
import torch

from extract.stats import ActivationStatistics, measure


def test_hand_worked_values():
    statistics = ActivationStatistics.of(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    assert statistics.count == 2
    assert statistics.mean.tolist() == [2.0, 2.0]
    assert statistics.variance.tolist() == [1.0, 4.0]
    assert statistics.mean_norm == 3.0  # (5 + 1) / 2


def test_merging_and_taking_out_equal_direct_computation():
    x = torch.randn(100, 7, dtype=torch.float64)
    whole, part = ActivationStatistics.of(x), ActivationStatistics.of(x[:30])
    merged = part + ActivationStatistics.of(x[30:])
    rest = whole - part
    for value, expected in [(merged, x), (rest, x[30:])]:
        torch.testing.assert_close(value.mean, expected.mean(0))
        torch.testing.assert_close(value.variance, expected.var(0, unbiased=False))
        assert abs(value.mean_norm - float(expected.norm(dim=1).mean())) < 1e-12


def test_bf16_input_keeps_its_variance():
    """Accumulated in bf16, a mean of 300 with variance 3 would be read back far off: bf16 has steps of 2 there."""
    x = (300 + torch.randn(20_000, 1).mul(3**0.5)).bfloat16()
    statistics = sum((ActivationStatistics.of(row) for row in x.split(16)), ActivationStatistics.empty(1))
    torch.testing.assert_close(statistics.variance, x.double().var(0, unbiased=False), rtol=1e-6, atol=0)


def test_json_is_exact():
    statistics = ActivationStatistics.of(torch.randn(50, 3) * 1e-3)
    again = ActivationStatistics.from_json(statistics.to_json())
    assert torch.equal(again.sum, statistics.sum) and torch.equal(again.sum_squares, statistics.sum_squares)
    assert (again.count, again.sum_norm) == (statistics.count, statistics.sum_norm)


def test_without_tokens_the_mean_is_not_a_number():
    assert ActivationStatistics.empty(2).mean.isnan().all() and ActivationStatistics.empty(2).variance.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 3), (700, 600), (5, 200_000)])  # several groups of rows; a row larger than one
def test_sums_are_those_of_exact_arithmetic(shape: tuple[int, int], dtype: torch.dtype):
    """Against math.fsum, which adds without rounding, on values whose sums cancel in float32."""
    x = (1000 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3e4).to(dtype)
    statistics, norms = measure(x)
    assert statistics.count == len(x) == len(norms)
    for column in (0, shape[1] // 2, shape[1] - 1):
        values = x[:, column].tolist()
        assert float(statistics.sum[column]) == pytest.approx(math.fsum(values), rel=1e-14)
        assert float(statistics.sum_squares[column]) == pytest.approx(math.fsum(v * v for v in values), rel=1e-14)
    for row in (0, len(x) - 1):
        assert float(norms[row]) == pytest.approx(math.sqrt(math.fsum(v * v for v in x[row].tolist())), rel=1e-14)
    assert statistics.sum_norm == pytest.approx(math.fsum(norms.tolist()), rel=1e-13)


def test_squares_beyond_float32_are_kept():
    statistics, norms = measure(torch.tensor([[3e30, 4e30], [3e-30, 4e-30]]))
    torch.testing.assert_close(norms, torch.tensor([5e30, 5e-30], dtype=torch.float64), rtol=1e-7, atol=0)
    assert statistics.sum_norm == pytest.approx(5e30, rel=1e-7)


def test_measuring_changes_nothing():
    x = torch.randn(3, 4, dtype=torch.float64)
    before = x.clone()
    measure(x)
    assert torch.equal(x, before)


def test_one_value_that_is_not_finite_shows_in_the_norm_of_its_row():
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(100, 2000).bfloat16()
        x[70, 1999] = bad
        assert (~measure(x)[1].isfinite()).nonzero().flatten().tolist() == [70]


def test_no_rows():
    statistics, norms = measure(torch.empty(0, 4))
    assert (statistics.count, statistics.sum_norm, len(norms)) == (0, 0.0, 0) and not statistics.sum.any()
