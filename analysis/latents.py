"""One pass over the kept tokens of a store: what every latent does, whose it is, and where it fires most.

Codes are inference codes, everything else lives in the scaled space of the crosscoder. One reading of the store feeds
`latents.parquet` (all latents), `examples.sqlite` (top documents) and `document_maxima.parquet` (for the tags), because
at terabytes of activations reading is what costs.
Shapes: B tokens, M models, D width, L latents, N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.columns import NORM, nu_column, pair_column
from analysis.config import AnalysisSettings, OwnerConfig
from analysis.examples import DocumentFirings, TopDocuments, write_examples
from analysis.scaling import (
    Codes,
    ScalingSums,
    decoder_gram,
    delta_norm_tags,
    holders,
    nu,
    owners,
)
from analysis.tags import MaximaWriter
from extract.devices import choose_device
from extract.errors import BadInput
from extract.models import load_tokenizer
from extract.publish import publishing
from train.crosscoder import Crosscoder
from train.data import ActivationPairs
from train.histograms import delta_norm
from train.runs import hookpoint_of

LATENTS, EXAMPLES, MAXIMA = "latents.parquet", "examples.sqlite", "document_maxima.parquet"


@dataclass(frozen=True)
class TokenBatch:
    """Kept tokens of whole documents: document numbers and positions (B,), raw activations (B, M, D)."""

    document_B: Tensor
    position_B: Tensor
    x_BMD: Tensor


def write_latents(settings: AnalysisSettings, crosscoder_folder: Path, folder: Path) -> None:
    """Writes the three files of this module into `folder`.

    Raises BadInput before the pass: for a store, crosscoder or tokenizer that is missing, and for a crosscoder of other
    models, of another hookpoint or without a threshold.
    """
    config = settings.analysis
    pairs = ActivationPairs.open(settings)
    crosscoder = Crosscoder.load(crosscoder_folder, str(choose_device(config.device, "analysis.device")))
    _check_fit(crosscoder, pairs, hookpoint_of(settings), crosscoder_folder)
    base = settings.place(pairs.models[0]).model
    tokenizer = load_tokenizer(base, settings.models[base])
    gram_LMM = decoder_gram(rows_by_model(crosscoder.W_dec, crosscoder))
    delta_norm_LMM = delta_norm(gram_LMM.diagonal(dim1=1, dim2=2).sqrt()).numpy()
    held_LM = holders(delta_norm_LMM, crosscoder.dedicated_owner.cpu().numpy(), config.owner)
    top = TopDocuments(crosscoder.num_latents, config.examples.top_documents)
    with publishing(folder / MAXIMA) as file, MaximaWriter(file, held_LM.sum(axis=1) == 1) as maxima:
        sums = run_pass(pairs, crosscoder, config.batch_tokens, top, maxima)
    write_examples(folder / EXAMPLES, top.result(), pairs.tokens, lambda ids: decode_exactly(tokenizer, ids))
    table = latent_table(sums, gram_LMM, crosscoder, config.owner)
    with publishing(folder / LATENTS) as file:
        pq.write_table(table.replace_schema_metadata({"share_dropped": str(pairs.share_dropped)}), file)


def decode_exactly(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of tokens as it stands: special tokens shown, spaces left alone."""
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@torch.inference_mode()
def run_pass(
    pairs: ActivationPairs, crosscoder: Crosscoder, batch_tokens: int, top: TopDocuments, maxima: MaximaWriter
) -> ScalingSums:
    """Encodes every kept token of the store once; fills `top` and `maxima`, and returns the sums of latent scaling."""
    device = crosscoder.W_dec.device
    sums = ScalingSums(crosscoder.num_latents, crosscoder.num_models, device)
    W_dec_LMD = rows_by_model(crosscoder.W_dec, crosscoder)
    seen_texts: set[str] = set()
    for batch in read_batches(pairs, batch_tokens):
        x_BMD = batch.x_BMD.to(device)
        codes = Codes.from_dense(crosscoder.encode(x_BMD))
        recons_BMD = (codes.decode(crosscoder.W_dec) + crosscoder.b_dec).view_as(x_BMD)
        sums.add(codes, crosscoder.scale(x_BMD), recons_BMD, W_dec_LMD)
        firings = group_by_document(codes, batch)
        maxima.add(firings)
        top.add(firings.select(np.isin(firings.document_g, new_texts(pairs, batch, seen_texts))))
    return sums


def read_batches(pairs: ActivationPairs, batch_tokens: int) -> Iterator[TokenBatch]:
    """All documents of a store in order: as many in a batch as fit `batch_tokens` kept tokens, at least one."""
    waiting: list[TokenBatch] = []
    with tqdm(total=pairs.tokens.num_tokens, unit="tok", unit_scale=True, desc="latents", disable=None) as bar:
        for document in range(pairs.num_documents):
            x_NMD, kept_N = pairs.document(document)
            position_B = kept_N.nonzero().squeeze(1)
            found = TokenBatch(torch.full_like(position_B, document), position_B, x_NMD[kept_N])
            if waiting and sum(len(part.x_BMD) for part in waiting) + len(found.x_BMD) > batch_tokens:
                yield _join(waiting)
                waiting = []
            waiting.append(found)
            bar.update(len(kept_N))
        yield _join(waiting)


def _join(parts: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(
        torch.cat([part.document_B for part in parts]),
        torch.cat([part.position_B for part in parts]),
        torch.cat([part.x_BMD for part in parts]),
    )


def group_by_document(codes: Codes, batch: TokenBatch) -> DocumentFirings:
    """The firing tokens of a batch by latent and document."""
    token_n = codes.token_n.cpu()
    columns = (batch.document_B[token_n], batch.position_B[token_n], codes.latent_n.cpu(), codes.value_n.cpu())
    return DocumentFirings.group(*(column.numpy() for column in columns))


def new_texts(pairs: ActivationPairs, batch: TokenBatch, seen: set[str]) -> list[int]:
    """The documents of a batch whose text no earlier document has; adds their texts to `seen`."""
    found = []
    for document in batch.document_B.unique().tolist():
        text = pairs.content[document]
        if text not in seen:
            found.append(document)
            seen.add(text)
    return found


def rows_by_model(weight_LW: Tensor, crosscoder: Crosscoder) -> Tensor:
    """(L, M*D) weights as (L, M, D)."""
    return weight_LW.detach().unflatten(1, (crosscoder.num_models, crosscoder.d_model))


def latent_table(sums: ScalingSums, gram_LMM: Tensor, crosscoder: Crosscoder, owner: OwnerConfig) -> pa.Table:
    """One row a latent; see `ARCHITECTURE.md` for the columns. What does not exist (nu of a dead latent) is nan."""
    norms_LM = gram_LMM.diagonal(dim1=1, dim2=2).sqrt()
    deltas = delta_norm(norms_LM).numpy()
    nu_error, nu_recons = (value_LMM.numpy() for value_LMM in nu(sums, gram_LMM))
    dedicated_owner_L, fired_L = crosscoder.dedicated_owner.cpu().numpy(), sums.num_active.cpu().numpy() > 0
    pairwise = {
        "delta_norm": deltas,
        "decoder_cosine": (gram_LMM / (norms_LM[:, :, None] * norms_LM[:, None, :])).numpy(),
    }
    columns = {
        "latent": np.arange(crosscoder.num_latents, dtype=np.int32),
        "owner": owners(deltas, nu_error, nu_recons, fired_L, dedicated_owner_L, crosscoder.models, owner),
        "dedicated": dedicated_owner_L >= 0,
        **_activity(sums),
        **{f"{NORM}{model}": norms_LM[:, m].numpy() for m, model in enumerate(crosscoder.models)},
        **_pair_columns(pairwise, deltas, fired_L, crosscoder.models, owner),
        **_nu_columns(nu_error, nu_recons, crosscoder.models),
    }
    return pa.table({name: pa.array(column) for name, column in columns.items()})


def _activity(sums: ScalingSums) -> dict[str, np.ndarray]:
    """How often and how strongly latents fire; the mean is over firing tokens."""
    return {
        "frequency": (sums.num_active.double() / sums.num_tokens).cpu().numpy(),
        "num_active_tokens": sums.num_active.cpu().numpy(),
        "mean_activation": (sums.sum_f / sums.num_active).cpu().numpy(),
        "max_activation": sums.max_f.cpu().numpy(),
    }


def _pair_columns(
    values: dict[str, np.ndarray],
    delta_norm_LMM: np.ndarray,
    fired_L: np.ndarray,
    models: list[str],
    owner: OwnerConfig,
) -> dict[str, np.ndarray]:
    """Columns of (base, tuned); with more models those of every ordered pair, `<name>_<a>_<b>`."""
    columns: dict[str, np.ndarray] = {}
    for a, b in ordered_pairs(len(models)) if len(models) > 2 else [(0, 1)]:
        names = models[a], models[b]
        columns |= {pair_column(name, models, *names): value_LMM[:, a, b] for name, value_LMM in values.items()}
        tags = delta_norm_tags(delta_norm_LMM[:, a, b], fired_L, names, owner)
        columns[pair_column("delta_norm_tag", models, *names)] = tags
    return columns


def _nu_columns(nu_error_LMM: np.ndarray, nu_recons_LMM: np.ndarray, models: list[str]) -> dict[str, np.ndarray]:
    """nu with every model as focus, towards every other."""
    columns: dict[str, np.ndarray] = {}
    for focus, other in ordered_pairs(len(models)):
        for name, nu_LMM in (("nu_error", nu_error_LMM), ("nu_reconstruction", nu_recons_LMM)):
            columns[nu_column(name, models, models[focus], models[other])] = nu_LMM[:, focus, other]
    return columns


def ordered_pairs(num_models: int) -> list[tuple[int, int]]:
    """(a, b) for all a != b."""
    return [(a, b) for a in range(num_models) for b in range(num_models) if a != b]


def _check_fit(crosscoder: Crosscoder, pairs: ActivationPairs, hookpoint: str, crosscoder_folder: Path) -> None:
    if crosscoder.models != pairs.models or crosscoder.d_model != pairs.d_model:
        raise BadInput(
            f"{crosscoder_folder} was trained on {crosscoder.models} of width {crosscoder.d_model}, the store holds "
            f"{pairs.models} of width {pairs.d_model}. Train the crosscoder again, or give its own store: store=PATH."
        )
    if crosscoder.hookpoint != hookpoint:
        raise BadInput(
            f"{crosscoder_folder} was trained at {crosscoder.hookpoint}, the activations are of hookpoint={hookpoint}. "
            f"Set the hookpoint that it was trained at, or train another crosscoder."
        )
    if crosscoder.threshold is None:
        raise BadInput(f"{crosscoder_folder} has no threshold yet (crosscoder.threshold_start_step). Train further.")
