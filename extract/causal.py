"""Whole language models: their cross-entropy on documents, with activations at hookpoints as they are or changed.

A model is taken apart into its decoder, which gives the last hidden states, and its head, which gives logits of them, a
few tokens at a time: logits of a whole batch over a large vocabulary would need more memory than the model.

Shapes: B documents of a batch, N tokens of the longest, D width, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from extract.config import ModelConfig, block_of
from extract.errors import BadInput
from extract.models import blocks_of, check_model, load_as, placed

LOGITS = 1 << 26  # that exist at a time; in float32 with their softmax 0.5 GB
# What becomes of the activations (B, N, D) at a hookpoint.
Change = Callable[[Tensor], Tensor]


@dataclass
class CausalModel:
    """A decoder with all its blocks, and the head, which wants hidden states as `inputs_embeds`. `blocks` are the
    modules whose outputs are the hookpoints; token ids go to `device`.
    """

    decoder: nn.Module
    head: nn.Module
    blocks: dict[str, nn.Module]
    device: torch.device
    vocabulary: int

    @property
    def num_bytes(self) -> int:
        """Of all weights; the embedding counts once where the head shares it."""
        weights = {id(weight): weight for part in (self.decoder, self.head) for weight in part.parameters()}
        return sum(weight.nbytes for weight in weights.values())

    @torch.inference_mode()
    def hidden_states(self, token_ids_BN: Tensor, mask_BN: Tensor, changes: Mapping[str, Change]) -> Tensor:
        """What the head reads, (B, N, D), where at each hookpoint of `changes` the activations were changed; `mask_BN`
        is 1 on tokens, 0 on padding at the right.
        """
        with self._changed(changes):
            output = self.decoder(
                input_ids=token_ids_BN.to(self.device), attention_mask=mask_BN.to(self.device), use_cache=False
            )
        return output[0]

    @torch.inference_mode()
    def summed_cross_entropy(self, states_BND: Tensor, token_ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """Sum () float64, in nats, of -log p(token i + 1 | tokens 0 to i of its document) over all tokens but the first
        of each document, from the hidden states. Softmax in float32.
        """
        predicted_BN = mask_BN[:, 1:].bool()
        target_P = token_ids_BN[:, 1:][predicted_BN].to(states_BND.device)
        states_PD = states_BND[:, :-1][predicted_BN.to(states_BND.device)]
        total = torch.zeros((), dtype=torch.float64, device=states_BND.device)
        size = max(1, LOGITS // self.vocabulary)
        for states_CD, target_C in zip(states_PD.split(size), target_P.split(size), strict=True):
            logits_CV = self.head(inputs_embeds=states_CD[None], use_cache=False).logits[0]
            total += functional.cross_entropy(logits_CV.float(), target_C, reduction="none").double().sum()
        return total.cpu()

    @contextmanager
    def _changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        handles = [self.blocks[place].register_forward_hook(_hook(change)) for place, change in changes.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def load_causal(
    name: str, config: ModelConfig, hookpoints: list[str], device: str | torch.device = "cpu"
) -> CausalModel:
    """Load all of model `name`; its adapter, dtype and attention are those of `extract.models.load_blocks`, so that
    activations are those that extraction stores. With `device_map: auto` the blocks are spread over all GPUs.

    Raises BadInput as in `check_model`, for damaged weights, and for a model without a head.
    """
    check_model(name, config, hookpoints)
    causal, missing = load_as(transformers.AutoModelForCausalLM, name, config)
    if missing:
        raise BadInput(
            f"models.{name}: the files of {config.id} lack {', '.join(missing[:3])}{' ...' if missing[3:] else ''}, "
            f"without which it predicts no tokens. Give a folder or a hub id of the whole model."
        )
    decoder = causal.get_decoder()
    _take_out(decoder, causal)
    text = causal.config.get_text_config()
    blocks = blocks_of(decoder, text.num_hidden_layers)
    decoder = placed(decoder, config, device)
    first = next(decoder.parameters()).device
    named = {hookpoint: blocks[block_of(hookpoint)] for hookpoint in hookpoints}
    return CausalModel(decoder, causal.to(device=first).eval(), named, first, text.vocab_size)


def _take_out(decoder: nn.Module, causal: nn.Module) -> None:
    """Leave of a model what it does after its decoder: projection, scaling, soft-capping, as its own code has them."""
    path = next(name for name, module in causal.named_modules() if module is decoder)
    parent, _, leaf = path.rpartition(".")
    setattr(causal.get_submodule(parent), leaf, _Given())


class _Given(nn.Module):
    """Stands where a decoder was: its embeddings are the last hidden states."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **settings: Any) -> _Handed:
        return _Handed(inputs_embeds)


class _Handed:
    """A decoder's output of which all that a head may ask for beside the hidden states is None."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _hook(change: Change) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook. Blocks give the activations alone, or first of several things."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook
