"""Language models, cut after the last block whose activations are wanted.

Blocks beyond the cut and the head are never built: half a model's depth costs half its time and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
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
    place = model_folder(name, config)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, place, "tokenizer", error) from error


def check_model(name: str, config: ModelConfig, hookpoints: list[str]) -> int:
    """The width D of model `name`, after every check that needs no weights in memory.

    Raises:
        BadInput: missing files, a block beyond the model, an adapter that belongs to another model.
    """
    architecture = _architecture(name, config)
    num_blocks = architecture.get_text_config().num_hidden_layers
    if (beyond := max(block_of(hookpoint) for hookpoint in hookpoints)) >= num_blocks:
        raise BadInput(
            f"hookpoint=block{beyond} is beyond models.{name}: {config.id} has {num_blocks} blocks, block0 to "
            f"block{num_blocks - 1}."
        )
    place = Path(model_folder(name, config))
    if place.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in place.iterdir()):
        raise BadInput(f"models.{name}.id={config.id} holds no weights: there is no .safetensors or .bin file.")
    if adapter := adapter_folder(name, config):
        _check_adapter(name, architecture, adapter)
    return architecture.get_text_config().hidden_size


def load_blocks(name: str, config: ModelConfig, hookpoints: list[str], device: str = "cpu") -> CutModel:
    """Load model `name` up to the last of `hookpoints`; BadInput as in `check_model`, and for damaged weights.

    A LoRA adapter is merged in float32 before weights are rounded to the configured dtype.
    """
    check_model(name, config, hookpoints)
    num_wanted = max(block_of(hookpoint) for hookpoint in hookpoints) + 1
    adapter = adapter_folder(name, config)
    model = _load_cut(name, config, num_wanted, with_head=adapter is not None)
    if adapter:  # adapters name their modules from the model with a head
        from peft import PeftModel  # slow to import, and most models need none

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().get_decoder()
    model = model.to(device=torch.device(device), dtype=getattr(torch, config.dtype)).eval()
    blocks = _blocks(model, num_wanted)
    return CutModel(model, {hookpoint: blocks[block_of(hookpoint)] for hookpoint in hookpoints}, torch.device(device))


def _architecture(name: str, config: ModelConfig) -> Any:
    place = model_folder(name, config)
    try:
        return transformers.AutoConfig.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError) as error:  # ValueError: an architecture that transformers does not know
        raise _cannot_load(name, place, "config.json", error) from error


def _load_cut(name: str, config: ModelConfig, num_wanted: int, with_head: bool) -> Any:
    """The model with its first `num_wanted` blocks."""
    place, architecture = model_folder(name, config), _architecture(name, config)
    text = architecture.get_text_config()
    text.num_hidden_layers = num_wanted
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_wanted]
    transformers.logging.set_verbosity_error()  # or it reports every weight beyond the cut as unexpected
    transformers.logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM if with_head else transformers.AutoModel
    try:
        return loader.from_pretrained(
            place,
            revision=config.revision,
            config=architecture,
            dtype=torch.float32 if with_head else getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _cannot_load(name, place, "model", error) from error


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


def _check_adapter(name: str, architecture: Any, adapter: Path) -> None:
    """BadInput unless every LoRA matrix has a module of its name and width in the whole model (built without
    memory).
    """
    with torch.device("meta"):
        modules = dict(transformers.AutoModelForCausalLM.from_config(architecture).named_modules())
    with _open_adapter(name, adapter) as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            path, found, _ = key.removeprefix("base_model.model.").partition(".lora_A")
            if not found:
                continue
            weight = getattr(modules.get(path), "weight", None)
            width = file.get_slice(key).get_shape()[-1]
            if weight is None or width not in weight.shape:
                there = "has no such module" if weight is None else f"has width {weight.shape[-1]} there"
                raise BadInput(
                    f"models.{name}.adapter={adapter} belongs to another model: {path} takes width {width}, "
                    f"models.{name}.id {there}."
                )


def _open_adapter(name: str, adapter: Path) -> Any:
    try:
        return safe_open(adapter / "adapter_model.safetensors", "pt")
    except SafetensorError as error:
        raise _cannot_load(name, str(adapter), "adapter", error) from error


def _blocks(model: nn.Module, expected: int) -> nn.ModuleList:
    """The list of transformer blocks: the longest ModuleList, which every decoder of transformers keeps them in."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len, default=nn.ModuleList())
    if len(blocks) != expected:
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
