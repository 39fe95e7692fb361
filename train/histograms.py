"""What a validation pass tells about latents: how often they fire, and whose they are by the norms of decoder rows.

Shapes: L latents, F of them that fire, M models, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from extract.metrics_file import Histogram, Metrics
from train.crosscoder import Crosscoder
from train.encoder import Operands
from train.placement import Share

# Bins of Delta-norm, from 0 to 1, an odd number so that 0.5 is in the middle of one; bins for each factor of ten of the
# firing frequency, down to one in 10^DECADES.
DELTA_NORM_BINS, BINS_PER_DECADE, DECADES = 51, 10, 7


def delta_norm(norms_LM: Tensor) -> Tensor:
    """Delta-norm of all ordered pairs (L, M, M): [j, a, b] is 0 where only a has a decoder row, 1 where only b has.

        0.5 * ((||d_j^b|| - ||d_j^a||) / max(||d_j^a||, ||d_j^b||) + 1)

    NaN where both rows are zero. Source: arXiv 2504.02922.
    """
    a_LM1, b_L1M = norms_LM[:, :, None], norms_LM[:, None, :]
    return 0.5 * ((b_L1M - a_LM1) / torch.maximum(a_LM1, b_L1M) + 1)


def latent_metrics(
    crosscoder: Crosscoder, fired_L: Tensor, num_tokens: float, operands: Operands, share: Share
) -> Metrics:
    """Of all latents, `fired_L` of `num_tokens` tokens each, all ranks together. Collective among share.latents."""
    models, rows = crosscoder.models, crosscoder.num_latents
    norms_lM = operands.W_dec.detach().view(rows, len(models), -1).norm(dim=2).double()
    facts_LK = norms_lM.new_zeros(share.num_latents, len(models) + 1)
    own = slice(share.first_latent, share.first_latent + rows)
    facts_LK[own] = torch.cat([norms_lM, crosscoder.dedicated_owner[:, None] + 1.0], dim=1)  # owners counted from 1
    share.latents.sum(facts_LK, "latents of validation")
    owner_F = facts_LK[fired_L > 0, -1]
    dedicated = crosscoder.config.dedicated > 0
    return {
        "val/silent": len(fired_L) - len(owner_F),
        **{f"val/dedicated_firing/{m}": int((owner_F == i).sum()) for i, m in enumerate(models, 1) if dedicated},
        "val/firing_frequency": frequency_histogram(fired_L, num_tokens),
        **delta_norm_histograms(facts_LK[:, :-1], models),
    }


def delta_norm_histograms(norms_LM: Tensor, models: Sequence[str]) -> dict[str, Histogram]:
    """Of every pair of models, the earlier one first; latents that neither has are left out."""
    delta_norm_LMM = delta_norm(norms_LM)
    return {
        f"val/delta_norm/{models[a]}_{models[b]}": histogram(delta_norm_LMM[:, a, b], 0.0, 1.0, DELTA_NORM_BINS)
        for a, b in itertools.combinations(range(len(models)), 2)
    }


def frequency_histogram(fired_L: Tensor, num_tokens: float) -> Histogram:
    """Of log10(share of the tokens on which a latent fires), over the latents that fire at all."""
    log_share_F = (fired_L[fired_L > 0].double() / num_tokens).log10()
    return histogram(log_share_F.clamp(min=-DECADES), -DECADES, 0.0, DECADES * BINS_PER_DECADE)


def histogram(values: Tensor, low: float, high: float, num_bins: int) -> Histogram:
    """Counts in bins of equal width, of which the last contains its upper edge; NaN is in none."""
    counts = torch.histc(values[~values.isnan()].float(), num_bins, low, high)
    edges = [low + (high - low) * i / num_bins for i in range(num_bins + 1)]
    return Histogram(edges, counts.long().tolist())
