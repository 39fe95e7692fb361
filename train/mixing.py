"""How well batches mix documents, measured beside what a full shuffle of all training tokens would give."""

from __future__ import annotations

import numpy as np
import torch

from train.stream import BatchStream

MEASURED_BATCHES = 4


def mixing(stream: BatchStream) -> str:
    """One line on what batches hold."""
    num_tokens, train_tokens = stream.num_tokens_per_step, stream.data.train_tokens
    return (
        f"{stream.num_lanes} lanes shuffle {stream.shuffle_window} tokens each: a batch of {num_tokens} tokens holds "
        f"{documents_in_batches(stream):.0f} documents; of a full shuffle it would hold "
        f"{expected_documents(train_tokens, num_tokens):.0f}"
    )


def documents_in_batches(stream: BatchStream) -> float:
    """Distinct documents in a batch, the mean of a few batches spread over the first epoch."""
    row_starts, num_steps = stream.data.tokens.row_starts, stream.steps_per_epoch
    steps = np.unique(np.linspace(0, num_steps - 1, min(MEASURED_BATCHES, num_steps)).astype(int))
    counts = [len(np.unique(np.searchsorted(row_starts, stream.plan(int(step)), side="right"))) for step in steps]
    return float(np.mean(counts))


def expected_documents(train_tokens: np.ndarray, num_tokens: int) -> float:
    """Distinct documents expected among B of all T tokens, drawn without replacement, when document d has n_d of them:

        sum_d 1 - C(T - n_d, B) / C(T, B)

    `train_tokens` (num_documents,) holds n_d, `num_tokens` is B <= T.
    """
    count_D = torch.from_numpy(train_tokens).double()
    total = count_D.sum()
    rest_D = total - count_D
    absent_D = _log_choose(rest_D, num_tokens) - _log_choose(total, num_tokens)
    return float(torch.where(rest_D < num_tokens, count_D.sign(), -absent_D.expm1()).sum())


def _log_choose(n: torch.Tensor, k: int) -> torch.Tensor:
    """log C(n, k) less log 1 / k!, which is the same for every n."""
    return torch.lgamma(n + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
