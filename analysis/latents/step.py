"""What every latent of a crosscoder does, whose it is, and where it fires most: all that one pass over a store gives.

    latents.parquet            one row a latent                                             `latent_table`
    examples.sqlite            top documents and samples of all latents                     `examples`
    document_maxima.parquet    for the tags                                                 `maxima`
    nulls.csv                  what nu is by chance, and for shared latents                 `nulls`
    rules.csv                  how many latents other rules and thresholds would select     `rules`
    groups.csv                 near-duplicates                                              `duplicates`

Codes are inference codes, everything else lives in the scaled space of the crosscoder. One reading of the store feeds
all of it, because at terabytes of activations reading is what costs; its finished state stays beside the files, and
what only they depend on (thresholds on nu, intervals, near-duplicates) is changed without reading again.
Shapes: L latents, M models, D width.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analysis.config import AnalysisConfig, AnalysisSettings
from analysis.examples.database import EXAMPLES, write_examples
from analysis.firings.config import check_groups
from analysis.firings.reading import BLOCK_TOKENS, Reading
from analysis.firings.token_kinds import read_kinds
from analysis.latents.one_pass import LatentPass, state_folder
from analysis.latents.outputs import GROUPS, LATENTS, MAXIMA, NULLS, RULES, write_outputs
from analysis.latents.owners import holders
from analysis.latents.progress import PassProgress
from analysis.latents.scaling import decoder_gram
from analysis.latents.state import PassState, alone
from extract.devices import choose_device
from extract.errors import BadInput
from extract.interrupts import stops_wait
from extract.stores import TokenStore
from extract.tokenizer import study_tokenizer, tokenizer_sha256
from extract.weights import differ
from train.crosscoder import CONFIG_FILE, WEIGHTS_FILE, Crosscoder
from train.data import ActivationPairs
from train.folder import sha256_of
from train.histograms import delta_norm
from train.runs import hookpoint_of

OUTPUTS = (LATENTS, EXAMPLES, MAXIMA, NULLS, RULES, GROUPS)
log = logging.getLogger(__name__)
# Of the pass; another number begins states anew.
FORMAT_VERSION = 4


def write_latents(settings: AnalysisSettings, crosscoder_folder: Path, folder: Path) -> None:
    """Writes `OUTPUTS` into `folder`. A pass that was stopped or killed goes on from its last saved state; one that is
    finished is not done again.

    Raises BadInput before the pass: for a store, crosscoder or tokenizer that is missing, tokens of another tokenizer,
    a crosscoder of other models, of another hookpoint or without a threshold, and while another process works on
    `folder`. KeyboardInterrupt after a signal to stop, with the state saved.
    """
    config = settings.analysis
    pairs = ActivationPairs.open(settings)
    crosscoder = Crosscoder.load(crosscoder_folder, str(choose_device(config.device, "analysis.device")))
    check_fit(crosscoder, pairs, hookpoint_of(settings), crosscoder_folder)
    check_groups(config.intervals.groups, crosscoder.num_latents)
    tokenizer = tokenizer_of(settings, pairs.tokens)
    kinds = read_kinds(pairs.tokens, control_tokens(tokenizer))
    reading = Reading(pairs, kinds, config.batch_tokens, config.intervals.groups)
    gram_LMM = decoder_gram(crosscoder.W_dec.unflatten(1, (crosscoder.num_models, crosscoder.d_model)))
    masks = owned_and_sampled(crosscoder, gram_LMM, config)
    state = PassState(state_folder(folder), identity_of(settings, pairs, crosscoder_folder, masks))
    with alone(state_folder(folder)):
        done = LatentPass(crosscoder, reading, config, *masks, state)
        run_pass(done, reading, config.save_minutes)
        write_outputs(folder, done, crosscoder, gram_LMM, config, pairs.share_dropped)
        examples = done.top.result(), done.samples.result()
        write_examples(folder / EXAMPLES, *examples, pairs.tokens, lambda ids: decode_exactly(tokenizer, ids))
        done.maxima.close()
        state.remove_others()


def owned_and_sampled(
    crosscoder: Crosscoder, gram_LMM: Tensor, config: AnalysisConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Masks (L,) of the latents that some models, but not all, may own by the weights, and of those that documents are
    drawn for.
    """
    delta_norm_LMM = delta_norm(gram_LMM.diagonal(dim1=1, dim2=2).sqrt()).numpy()
    num_holders_L = holders(delta_norm_LMM, crosscoder.dedicated_owner.cpu().numpy(), config.owner).sum(axis=1)
    is_held_L = (num_holders_L > 0) & (num_holders_L < crosscoder.num_models)
    return is_held_L, np.ones_like(is_held_L) if config.examples.sampled == "all" else is_held_L


def run_pass(done: LatentPass, reading: Reading, save_minutes: float) -> None:
    """Adds all batches that are missing; saves the state now and then, when stopped, and at the end."""
    tokens_before = reading.tokens_before
    if done.next_batch == reading.num_batches:
        print("latents: nothing to read, all sums are there: the tables are made of them", file=sys.stderr)
        return
    with stops_wait() as is_asked, PassProgress(reading.num_tokens, tokens_before(done.next_batch)) as progress:
        saved = time.monotonic()
        for batch in reading.batches(done.next_batch):
            done.add(batch)
            progress.update(tokens_before(done.next_batch))
            is_last = done.next_batch == reading.num_batches
            if is_last or is_asked() or time.monotonic() - saved > 60 * save_minutes:
                done.save()
                saved = time.monotonic()
            if is_asked():
                break


def identity_of(
    settings: AnalysisSettings, pairs: ActivationPairs, crosscoder_folder: Path, masks: Sequence[np.ndarray]
) -> dict[str, Any]:
    """All that decides what a pass gathers. Thresholds do so only by the latents of its `masks`."""
    config = settings.analysis
    return {
        "format_version": FORMAT_VERSION,
        "crosscoder": [sha256_of(crosscoder_folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)],
        "data": pairs.content_sha256,
        "kept": asdict(settings.kept),
        "batches": [config.batch_tokens, BLOCK_TOKENS],
        "groups": config.intervals.groups,
        "examples": asdict(config.examples),
        "nulls": asdict(config.nulls),
        "owner": [hashlib.sha256(np.packbits(mask_L).tobytes()).hexdigest() for mask_L in masks],
    }


def tokenizer_of(settings: AnalysisSettings, tokens: TokenStore) -> Any:
    """The study's tokenizer. BadInput unless it made the tokens, as far as their manifest says: any other reads numbers
    as other words.
    """
    tokenizer = study_tokenizer(settings)
    made_with = tokens.manifest.settings.get("tokenizer_sha256")
    if made_with not in (None, tokenizer_sha256(tokenizer)):
        raise BadInput(
            f"{tokens.folder} was made with another tokenizer or chat template than that of models "
            f"({', '.join(f'{name}={model.id}' for name, model in settings.models.items())}). Give the models, and "
            "corpus.chat_template if it was set, that the tokens were made with; or the store of these models: "
            "store=PATH."
        )
    return tokenizer


def control_tokens(tokenizer: Any) -> list[int]:
    """The numbers of all special tokens, not only of those that have a role such as the end of a text."""
    return [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]


def decode_exactly(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of tokens as it stands: special tokens shown, spaces left alone."""
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_fit(crosscoder: Crosscoder, pairs: ActivationPairs, hookpoint: str, crosscoder_folder: Path) -> None:
    """Raises BadInput for a store that the crosscoder cannot be of.

    Warns of activations that differ from those of training on the same tokens, where their weights are not known to
    be others: they may be only of another dtype, or of models tuned again under their old names before crosscoders
    recorded weights.
    """
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
    trained_on = crosscoder.trained_with.get("weights", {})
    strangers = [model for model, weights in pairs.weights.items() if differ(trained_on.get(model, {}), weights)]
    if strangers:
        raise BadInput(
            f"{crosscoder_folder} was trained on other weights of {' and '.join(strangers)} than the store was made "
            "with. Train the crosscoder again, or give the store of the weights that it was trained on: store=PATH."
        )
    if crosscoder.threshold is None:
        raise BadInput(f"{crosscoder_folder} has no threshold yet (crosscoder.threshold_start_step). Train further.")
    theirs, ours = crosscoder.trained_with.get("data") or [], pairs.content_sha256
    if theirs[:1] == ours[:1] and theirs != ours:
        others = [model for model, a, b in zip(pairs.models, theirs[1:], ours[1:], strict=True) if a != b]
        log.warning(
            "%s was trained on other activations of the same tokens: those of %s have changed since. If these models "
            "are not the same any more, train the crosscoder again: what follows would be of strangers.",
            crosscoder_folder,
            " and ".join(others),
        )
