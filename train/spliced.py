"""The language models of a pair's members on a batch of documents: as they are, or with activations put in their place.

Shapes: B documents of a batch, N tokens of the longest, T kept tokens of the batch, M members, D width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.activations import check_spread, worker_device
from extract.batches import padded
from extract.causal import CausalModel, Change, load_causal
from extract.config import ExtractSettings, Place
from extract.errors import BadInput
from extract.live import check_models
from extract.models import check_context
from extract.stores import ActivationStore
from extract.weights import identity, weights_of

log = logging.getLogger(__name__)


class Batch:
    """Documents, padded at the right: token ids and mask (B, N), and which tokens are kept, `kept_BN`, bool."""

    def __init__(self, token_ids: Sequence[np.ndarray], is_kept: Sequence[np.ndarray]):
        self.token_ids_BN, self.mask_BN = padded(token_ids)
        self.kept_BN = torch.zeros_like(self.mask_BN, dtype=torch.bool)
        for row, is_kept_n in enumerate(is_kept):
            self.kept_BN[row, : len(is_kept_n)] = torch.from_numpy(is_kept_n)


class MemberModels:
    """Whole language models, each loaded once however many members are places in it. They are loaded by `load`, or the
    first call that runs them.
    """

    def __init__(self, settings: ExtractSettings, members: Sequence[str], longest: int):
        """For documents of up to `longest` tokens. BadInput for models that cannot be used, found without weights."""
        self.places = [settings.place(member) for member in members]
        self._hookpoints: dict[str, list[str]] = {}
        for place in self.places:
            self._hookpoints.setdefault(place.model, []).append(place.hookpoint)
        self._configs = {name: settings.models[name] for name in self._hookpoints}
        self._device = worker_device(settings.activations.device, os.environ)
        check_spread(settings, os.environ)
        self.d_model = check_models(self._configs, self._hookpoints)
        for name, config in self._configs.items():
            check_context(name, config, longest)
        self._models: dict[str, CausalModel] = {}

    def load(self) -> None:
        """Load the models, unless they are there, and say what memory they take. BadInput where a GPU lacks it."""
        if self._models:
            return
        try:
            self._models = {
                name: load_causal(name, config, self._hookpoints[name], self._device)
                for name, config in self._configs.items()
            }
        except torch.cuda.OutOfMemoryError as error:
            raise BadInput(
                f"The language models {', '.join(self._configs)} do not fit {self._device} beside what is there "
                f"({str(error).splitlines()[0]}). Measure loss recovered in a job of its own: leave out "
                "training.recovered_tokens and run python -m train.evaluate, there with models.NAME.device_map=auto "
                "if they are larger than a GPU."
            ) from error
        gigabytes = sum(model.num_bytes for model in self._models.values()) / 1e9
        log.info("Loss recovered: %s take %.3g GB of %s", ", ".join(self._models), gigabytes, self._device)

    def clean(self, batch: Batch, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """The kept activations (T, M, D), float32, in the order of the documents, and the cross-entropies (M,), summed
        in nats and float64, of models as they are; these are zero unless wanted.
        """
        self.load()
        caught: dict[Place, Tensor] = {}
        entropies = dict.fromkeys(self._models, torch.zeros((), dtype=torch.float64))
        for name, model in self._models.items():
            catching = {at: _catching(batch, caught, Place(name, at)) for at in self._hookpoints[name]}
            states_BND = model.hidden_states(batch.token_ids_BN, batch.mask_BN, catching)
            if with_entropy:
                entropies[name] = model.summed_cross_entropy(states_BND, batch.token_ids_BN, batch.mask_BN)
        x_TMD = torch.stack([caught[place].to(caught[self.places[0]].device) for place in self.places], dim=1)
        return x_TMD, torch.stack([entropies[place.model] for place in self.places])

    def replaced(self, batch: Batch, x_TMD: Tensor) -> Tensor:
        """Cross-entropies (M,), summed in nats and float64: member m with x_TMD[:, m] for its kept activations."""
        self.load()
        entropies = []
        for m, place in enumerate(self.places):
            model, change = self._models[place.model], {place.hookpoint: _replacing(batch, x_TMD[:, m])}
            states_BND = model.hidden_states(batch.token_ids_BN, batch.mask_BN, change)
            entropies.append(model.summed_cross_entropy(states_BND, batch.token_ids_BN, batch.mask_BN))
        return torch.stack(entropies)


def check_stored(settings: ExtractSettings, places: Sequence[Place], stores: Sequence[ActivationStore]) -> None:
    """BadInput where a store holds activations of another model than the settings name now, as far as both say. What
    they cannot tell, for one is a folder and the other on the hub, is said in the log.
    """
    for place, store in zip(places, stores, strict=True):
        config, then = settings.models[place.model], store.manifest.model or {}
        now = identity(place.model, config, weights_of(place.model, config, Path(settings.outputs)))
        if "weights" not in then:
            continue
        if bool(then["weights"]["files"]) != bool(now["weights"]["files"]):
            log.warning("Loss recovered: %s came from elsewhere when %s was extracted", place.model, store.folder)
            continue
        differing = [key for key in now if then.get(key) != now[key]]
        if differing:
            raise BadInput(
                f"models.{place.model} is not the model whose activations {store.folder} holds: it differs in "
                f"{', '.join(differing)}. Name that model, or extract the activations of this one into another store."
            )


def _catching(batch: Batch, caught: dict[Place, Tensor], place: Place) -> Change:
    def catch(acts_BND: Tensor) -> Tensor:
        caught[place] = acts_BND[batch.kept_BN.to(acts_BND.device)].float()
        return acts_BND

    return catch


def _replacing(batch: Batch, x_TD: Tensor) -> Change:
    def replace(acts_BND: Tensor) -> Tensor:
        changed_BND = acts_BND.clone()
        changed_BND[batch.kept_BN.to(acts_BND.device)] = x_TD.to(acts_BND.device, acts_BND.dtype)
        return changed_BND

    return replace
