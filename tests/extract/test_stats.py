import torch

from extract.stats import ActivationStatistics


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
