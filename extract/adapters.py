"""LoRA adapters: found, checked against the model that they were trained on, and merged into its decoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from extract.config import ModelConfig
from extract.errors import BadInput

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter_folder(name: str, config: ModelConfig) -> Path | None:
    """The folder of the model's LoRA adapter, fetched from the hub if it is not a local one."""
    if config.adapter is None:
        return None
    folder = Path(config.adapter)
    if not folder.is_dir():
        if config.adapter.count("/") != 1:
            raise BadInput(
                f"models.{name}.adapter={config.adapter} is not a folder. Give a folder with {CONFIG}, or a hub id."
            )
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(config.adapter, revision=config.adapter_revision))
        except Exception as error:  # connection, authorisation, not found: the library raises many kinds
            raise _cannot_load(name, config.adapter, error) from error
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise BadInput(
                f"models.{name}.adapter={config.adapter} lacks {file}. Save the adapter with peft's save_pretrained."
            )
    return folder


def check_adapter(name: str, architecture: Any, adapter: Path) -> None:
    """BadInput unless every adapted module is in the model (peft ignores those that are not) and has that width."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        modules = dict(transformers.AutoModelForCausalLM.from_config(architecture).named_modules())
    with _open(name, adapter) as file:
        for path, width in _adapted(file).items():
            weight = getattr(modules.get(path), "weight", None)
            if weight is None or width not in weight.shape:
                there = "has no such module" if weight is None else f"has width {weight.shape[-1]} there"
                raise BadInput(
                    f"models.{name}.adapter={adapter} belongs to another model: {path} takes width {width}, "
                    f"models.{name}.id {there}."
                )


def _adapted(file: Any) -> dict[str, int]:
    """The modules that an adapter's file of weights changes, by their names in the model with a head; their widths."""
    parts = {key: key.removeprefix("base_model.model.").partition(".lora_A") for key in file.keys()}  # noqa: SIM118
    return {path: file.get_slice(key).get_shape()[-1] for key, (path, found, _) in parts.items() if found}


def merge_adapter(model: nn.Module, adapter: Path) -> None:
    """Add the adapter's products B A, scaled, to the weights of `model`, in the weights' own precision.

    An adapter names its modules from the model with a head. Around a decoder without one, a shell with the decoder
    under its usual name stands for that model. Adapted blocks beyond a cut find no module and are left out.
    """
    from peft import PeftConfig, PeftModel  # slow to import, and most models need none

    whole = model
    if model.base_model is model:
        whole = nn.Module()
        whole.add_module(str(model.base_model_prefix), model)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        if dict(whole.named_modules()).keys().isdisjoint(_adapted(file)):
            return  # peft refuses to change nothing
    config = PeftConfig.from_pretrained(str(adapter))
    config.task_type = None  # peft would ask a shell to generate text
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers to peft, about its own use of it
        PeftModel.from_pretrained(whole, str(adapter), config=config).merge_and_unload()


def _open(name: str, adapter: Path) -> Any:
    try:
        return safe_open(adapter / WEIGHTS, "pt")
    except SafetensorError as error:
        raise _cannot_load(name, str(adapter), error) from error


def _cannot_load(name: str, place: str, error: Exception) -> BadInput:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BadInput(
        f"models.{name}: the adapter of {place} could not be loaded ({first}). Check models.{name}.adapter and "
        f"adapter_revision; gated repositories need HF_TOKEN."
    )
