"""The two preference losses, as pure functions of answer log-probabilities.

Shapes: B pairs or sequences, T answer tokens (padded), V vocabulary. All log-probabilities are natural logarithms.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def answer_log_probs(logits_BTV: Tensor, tokens_BT: Tensor, is_answer_BT: Tensor) -> Tensor:
    """log p(token_t) where `is_answer_BT`, else 0; shape (B, T). `logits_BTV[:, t]` predict `tokens_BT[:, t]`."""
    log_probs_BT = logits_BTV.float().log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]
    return torch.where(is_answer_BT, log_probs_BT, 0.0)


def mean_log_prob(log_probs_BT: Tensor, is_answer_BT: Tensor) -> Tensor:
    """log p(answer) / |answer| per sequence, (B,). An empty answer is an error of the caller and gives NaN."""
    return log_probs_BT.sum(1) / is_answer_BT.sum(1)


def simpo_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO, without a reference model (Meng et al., arXiv 2405.14734, equation 6); per pair, (B,).

        loss = -log sigmoid(beta * (chosen - rejected) - gamma)

    `chosen_B` and `rejected_B` are length-averaged log-probabilities (`mean_log_prob`), `gamma` the target margin.
    """
    return -logsigmoid(beta * (chosen_B - rejected_B) - gamma)


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, beta: float
) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, equation 7); per pair, (B,).

        loss = -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))

    All four are log-probabilities summed over the answer; the reference is the model before tuning.
    """
    return -logsigmoid(beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B)))
