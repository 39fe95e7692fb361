"""Language models, cut after the last block whose activations are wanted.

Blocks beyond the cut and the head are never built: half a model's depth costs half its time and memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from extract.config import ModelConfig, block_of
from extract.errors import BadInput
from extract.gguf import convert_gguf


@dataclass
class CutModel:
    """A decoder cut after its last wanted block. `blocks` are the modules whose outputs are the hookpoints."""

    decoder: nn.Module
    blocks: dict[str, nn.Module]
    device: torch.device

    @torch.inference_mode()
    def activations(self, token_ids_BN: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Residual streams (B, N, D) after each wanted block; `mask_BN` is 1 on tokens, 0 on padding at the right."""
        caught: dict[str, Tensor] = {}

        def catch(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                caught[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [block.register_forward_hook(catch(name)) for name, block in self.blocks.items()]
        try:
            self.decoder(
                input_ids=token_ids_BN.to(self.device), attention_mask=mask_BN.to(self.device), use_cache=False
            )
        finally:
            for handle in handles:
                handle.remove()
        return caught


def load_tokenizer(name: str, config: ModelConfig) -> Any:
    """The fast tokenizer of model `name`; BadInput if its files are not there."""
    from transformers import AutoTokenizer

    place = model_folder(name, config)
    try:
        return AutoTokenizer.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, place, "tokenizer", error) from error


def load_blocks(name: str, config: ModelConfig, hookpoints: list[str], device: str = "cpu") -> CutModel:
    """Load model `name` up to the last of `hookpoints`.

    A LoRA adapter is merged in float32 before weights are rounded to the configured dtype.

    Raises:
        BadInput: missing files, a block beyond the model, an adapter that belongs to another model.
    """
    num_wanted = max(block_of(hookpoint) for hookpoint in hookpoints) + 1
    adapter = adapter_folder(name, config)
    model, num_blocks = _load_cut(name, config, num_wanted, with_head=adapter is not None)
    if adapter:  # adapters name their modules from the model with a head
        model = _merge(name, model, adapter, num_blocks).get_decoder()
    model = model.to(device=torch.device(device), dtype=getattr(torch, config.dtype)).eval()
    blocks = _blocks(model, num_wanted)
    return CutModel(model, {hookpoint: blocks[block_of(hookpoint)] for hookpoint in hookpoints}, torch.device(device))


def _load_cut(name: str, config: ModelConfig, num_wanted: int, with_head: bool) -> tuple[Any, int]:
    """The model with its first `num_wanted` blocks, and how many the whole one has."""
    import transformers

    place = model_folder(name, config)
    transformers.logging.set_verbosity_error()  # or it reports every weight beyond the cut as unexpected
    transformers.logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM if with_head else transformers.AutoModel
    try:
        architecture = transformers.AutoConfig.from_pretrained(place, revision=config.revision)
        text = architecture.get_text_config()
        num_blocks = text.num_hidden_layers
        if num_wanted > num_blocks:
            raise BadInput(
                f"hookpoint=block{num_wanted - 1} is beyond models.{name}: {config.id} has {num_blocks} blocks, "
                f"block0 to block{num_blocks - 1}."
            )
        text.num_hidden_layers = num_wanted
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_wanted]
        model = loader.from_pretrained(
            place,
            revision=config.revision,
            config=architecture,
            dtype=torch.float32 if with_head else getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )
    except OSError as error:
        raise _cannot_load(name, place, "weights", error) from error
    return model, num_blocks


def model_folder(name: str, config: ModelConfig) -> str:
    """The folder or hub id to load from; a GGUF file is converted into a folder beside it first."""
    if config.gguf:
        file = Path(config.id) / config.gguf
        return str(convert_gguf(file, file.with_suffix("")))
    looks_local = config.id.startswith((".", "/", "~")) or config.id.count("/") != 1
    if looks_local and not Path(config.id).is_dir():
        raise BadInput(
            f"models.{name}.id={config.id} is not a folder. Give a folder with config.json, or a hub id such as "
            f"org/name."
        )
    return config.id


def adapter_folder(name: str, config: ModelConfig) -> Path | None:
    """The folder of the model's LoRA adapter, fetched from the hub if it is not a local one."""
    if config.adapter is None:
        return None
    folder = Path(config.adapter)
    if not folder.is_dir():
        if config.adapter.count("/") != 1:
            raise BadInput(
                f"models.{name}.adapter={config.adapter} is not a folder. Give a folder with adapter_config.json, "
                f"or a hub id."
            )
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(config.adapter))
        except Exception as error:  # connection, authorisation, not found: the library raises many kinds
            raise _cannot_load(name, config.adapter, "adapter", error) from error
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).exists():
            raise BadInput(
                f"models.{name}.adapter={config.adapter} lacks {file}. Save the adapter with peft's save_pretrained."
            )
    return folder


def _merge(name: str, model: nn.Module, adapter: Path, num_blocks: int) -> Any:
    from peft import PeftModel

    _check_adapter(name, model, adapter, num_blocks)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _check_adapter(name: str, model: nn.Module, adapter: Path, num_blocks: int) -> None:
    """BadInput unless every LoRA matrix has a module of its name and width (those of blocks beyond the cut: a block of
    its number).
    """
    kept_blocks = len(_blocks(model, None))
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            path, found, _ = key.removeprefix("base_model.model.").partition(".lora_A")
            block = re.search(r"\.(\d+)\.", path)
            if not found or (block and kept_blocks <= int(block[1]) < num_blocks):
                continue
            module = dict(model.named_modules()).get(path)
            weight = getattr(module, "weight", None)
            width = file.get_slice(key).get_shape()[-1]
            if weight is None or width not in weight.shape:
                there = "has no such module" if weight is None else f"has width {weight.shape[-1]} there"
                raise BadInput(
                    f"models.{name}.adapter={adapter} belongs to another model: {path} takes width {width}, "
                    f"models.{name}.id {there}."
                )


def _blocks(model: nn.Module, expected: int | None) -> nn.ModuleList:
    """The list of transformer blocks: the longest ModuleList, which every decoder of transformers keeps them in."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len, default=nn.ModuleList())
    if expected is not None and len(blocks) != expected:
        raise BadInput(
            f"{type(model).__name__} keeps its {expected} blocks in no ModuleList that could be found; this "
            f"architecture is not supported."
        )
    return blocks


def _cannot_load(name: str, place: str, what: str, error: Exception) -> BadInput:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BadInput(
        f"models.{name}: the {what} of {place} could not be loaded ({first}). Check models.{name}.id; gated models "
        f"need HF_TOKEN."
    )
