"""Language models, cut after the last block whose activations are wanted.

Blocks beyond the cut and the head are never built: half a model's depth costs half its time and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from extract.adapters import adapter_folder, check_adapter, merge_adapter
from extract.config import ModelConfig, block_of
from extract.errors import BadInput
from extract.gguf import convert_gguf


@dataclass
class CutModel:
    """A decoder cut after its last wanted block. `blocks` are the modules whose outputs are the hookpoints; token ids
    go to `device`.
    """

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
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, place, "tokenizer", error) from error
    if not tokenizer.is_fast:
        raise BadInput(
            f"models.{name}: the tokenizer of {place} ({type(tokenizer).__name__}) has no fast form, which says where "
            f"in the text each token lies. Add its tokenizer.json, or choose another model."
        )
    return tokenizer


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
    _attention(name, config, architecture)
    if adapter := adapter_folder(name, config):
        check_adapter(name, architecture, adapter)
    width = architecture.get_text_config().hidden_size
    if config.d_model not in (None, width):
        raise BadInput(f"models.{name}.d_model={config.d_model}, but {config.id} has width {width}. Leave it out.")
    return width


def check_context(name: str, config: ModelConfig, longest: int) -> None:
    """BadInput for documents of more tokens than the model has positions: some models cannot compute them, for others
    they are text as they never saw it.
    """
    positions = getattr(_architecture(name, config).get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise BadInput(
            f"corpus.context_length: the tokens hold a document of {longest}, models.{name} has {positions} positions. "
            f"Make tokens with corpus.context_length={positions} in another store=PATH."
        )


def load_blocks(name: str, config: ModelConfig, hookpoints: list[str], device: str | torch.device = "cpu") -> CutModel:
    """Load model `name` up to the last of `hookpoints`; BadInput as in `check_model`, and for damaged weights.

    A LoRA adapter is merged in float32 before weights are rounded to the configured dtype. With `device_map: auto` the
    blocks are spread over all GPUs that the process sees, and `device` is not used.
    """
    check_model(name, config, hookpoints)
    num_wanted = max(block_of(hookpoint) for hookpoint in hookpoints) + 1
    loaded, _ = load_as(transformers.AutoModel, name, config, num_wanted)
    # Of a model that also reads images its text decoder, without the rest; releases before 5 say None of others.
    decoder = placed(loaded.get_decoder() or loaded, config, device)
    blocks = blocks_of(decoder, num_wanted)
    first = next(decoder.parameters()).device
    return CutModel(decoder, {hookpoint: blocks[block_of(hookpoint)] for hookpoint in hookpoints}, first)


def _architecture(name: str, config: ModelConfig) -> Any:
    place = model_folder(name, config)
    try:
        return transformers.AutoConfig.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError) as error:  # ValueError: an architecture that transformers does not know
        raise _cannot_load(name, place, "config.json", error) from error


def _attention(name: str, config: ModelConfig, architecture: Any) -> str | None:
    """The attention to ask transformers for; None = its own choice for the architecture.

    Gemma-2 caps its attention logits, cap * tanh(logits / cap); sdpa cannot, and some releases of transformers then
    leave the cap out without a word.
    """
    if getattr(architecture.get_text_config(), "attn_logit_softcapping", None) is None:
        return config.attention
    if config.attention == "sdpa":
        raise BadInput(
            f"models.{name}.attention=sdpa leaves out the soft-capping of attention logits that {config.id} was "
            f"trained with. Leave it out (eager is chosen), or use flash_attention_2 or flex_attention."
        )
    return config.attention or "eager"


def load_as(kind: Any, name: str, config: ModelConfig, num_wanted: int | None = None) -> tuple[Any, list[str]]:
    """The model as the auto class `kind` makes it, its adapter merged, in the configured dtype, on the CPU; of its text
    decoder the first `num_wanted` blocks, or all. And the names of parameters that its files do not hold.
    """
    dtype, adapter = getattr(torch, config.dtype), adapter_folder(name, config)
    loaded, missing = _load(kind, name, config, num_wanted, torch.float32 if adapter else dtype)
    if adapter:
        merge_adapter(loaded, adapter)
        for parameter in loaded.parameters():  # buffers, as rotary frequencies, stay as they are in a model without one
            parameter.data = parameter.data.to(dtype)
    return loaded, missing


def _load(
    kind: Any, name: str, config: ModelConfig, num_wanted: int | None, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    place, architecture = model_folder(name, config), _architecture(name, config)
    text = architecture.get_text_config()
    text.num_hidden_layers = num_wanted or text.num_hidden_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    transformers.logging.set_verbosity_error()  # or it reports every weight beyond the cut as unexpected
    transformers.logging.disable_progress_bar()
    try:
        loaded, found = kind.from_pretrained(
            place,
            revision=config.revision,
            config=architecture,
            dtype=dtype,
            attn_implementation=_attention(name, config, architecture),
            output_loading_info=True,
        )
        return loaded, sorted(found["missing_keys"])
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _cannot_load(name, place, "model", error) from error


def placed(decoder: Any, config: ModelConfig, device: str | torch.device) -> Any:
    """The decoder on `device`, or spread as `device_map` says; ready to compute."""
    return (_spread(decoder) if config.device_map == "auto" else decoder.to(device=torch.device(device))).eval()


def _spread(decoder: Any) -> Any:
    """The decoder on all visible GPUs, whole blocks in turn, each device given about the same share."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = decoder._no_split_modules
    memory = get_balanced_memory(decoder, no_split_module_classes=whole)
    return dispatch_model(decoder, infer_auto_device_map(decoder, memory, no_split_module_classes=whole))


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


def blocks_of(model: nn.Module, expected: int) -> nn.ModuleList:
    """The list of a decoder's blocks, which every one of transformers keeps in a ModuleList: of those with the expected
    length it is the one with the most parameters, for experts and the like lie within blocks.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == expected]
    blocks = max(lists, key=_num_parameters, default=None)
    if blocks is None:
        raise BadInput(
            f"{type(model).__name__} keeps its {expected} blocks in no ModuleList that could be found; this "
            f"architecture is not supported."
        )
    return blocks


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cannot_load(name: str, place: str, what: str, error: Exception) -> BadInput:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BadInput(
        f"models.{name}: the {what} of {place} could not be loaded ({first}). Check models.{name}.id; gated models "
        f"need HF_TOKEN."
    )
