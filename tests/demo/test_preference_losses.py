"""The two losses against values worked out by hand, and their gradients against finite differences."""

import math

import pytest
import torch

from demo.preference_losses import answer_log_probs, dpo_loss, mean_log_prob, simpo_loss


def softplus(x: float) -> float:
    """-log sigmoid(-x), by its definition."""
    return math.log(1 + math.exp(x))


def test_log_probs_of_uniform_logits_are_minus_log_vocabulary_on_answer_tokens_only() -> None:
    logits_BTV = torch.zeros(1, 3, 8)
    log_probs_BT = answer_log_probs(logits_BTV, torch.tensor([[1, 5, 7]]), torch.tensor([[True, True, False]]))
    assert log_probs_BT.tolist()[0] == pytest.approx([-math.log(8), -math.log(8), 0.0])


def test_log_probs_pick_the_given_token() -> None:
    logits_BTV = torch.tensor([[[0.0, math.log(3.0)]]])  # probabilities 1/4 and 3/4
    is_answer_BT = torch.tensor([[True]])
    assert answer_log_probs(logits_BTV, torch.tensor([[0]]), is_answer_BT).item() == pytest.approx(math.log(0.25))
    assert answer_log_probs(logits_BTV, torch.tensor([[1]]), is_answer_BT).item() == pytest.approx(math.log(0.75))


def test_padding_changes_neither_the_mean_nor_a_gradient() -> None:
    logits_BTV = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    is_answer_BT = torch.tensor([[True, True, False]])
    mean = mean_log_prob(answer_log_probs(logits_BTV, torch.tensor([[1, 2, 0]]), is_answer_BT), is_answer_BT)
    expected = (logits_BTV.log_softmax(-1)[0, 0, 1] + logits_BTV.log_softmax(-1)[0, 1, 2]) / 2
    assert mean.item() == pytest.approx(expected.item())
    mean.sum().backward()
    assert logits_BTV.grad is not None and torch.equal(logits_BTV.grad[0, 2], torch.zeros(5))


def test_simpo_values() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    # 2 * 0.5 - 1 = 0 and 2 * -1.5 - 1 = -4
    assert simpo_loss(chosen, rejected, beta=2.0, gamma=1.0).tolist() == pytest.approx([math.log(2), softplus(4)])


def test_dpo_values() -> None:
    loss = dpo_loss(torch.tensor([-10.0]), torch.tensor([-30.0]), torch.tensor([-15.0]), torch.tensor([-25.0]), 0.1)
    assert loss.item() == pytest.approx(softplus(-1.0))  # 0.1 * (5 - (-5)) = 1


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    chosen, rejected = torch.tensor([-3.0, -80.0]), torch.tensor([-9.0, -1.0])
    assert dpo_loss(chosen, rejected, chosen, rejected, 0.7).tolist() == pytest.approx([math.log(2)] * 2)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda c, r: simpo_loss(c, r, 2.0, 0.5), inputs[:2])
    assert torch.autograd.gradcheck(lambda *four: dpo_loss(*four, 0.3), inputs)
    tokens_BT, is_answer_BT = torch.tensor([[1, 3]]), torch.tensor([[True, False]])
    logits_BTV = torch.randn(1, 2, 4, requires_grad=True)
    answer_log_probs(logits_BTV, tokens_BT, is_answer_BT).sum().backward()
    expected = torch.eye(4)[1] - logits_BTV[0, 0].detach().softmax(-1)  # d log p(token) / d logits
    assert logits_BTV.grad is not None
    torch.testing.assert_close(logits_BTV.grad[0, 0], expected)


def test_extreme_margins_stay_finite() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = simpo_loss(far, torch.zeros(2), beta=1.0, gamma=0.0)
    assert loss.tolist() == pytest.approx([0.0, 1e4])
    loss.sum().backward()
    assert far.grad is not None and far.grad.tolist() == pytest.approx([0.0, -1.0])
