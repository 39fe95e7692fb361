"""Tiny random models of real architectures and a small byte-level tokenizer, for tests that run the real code without
downloads.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<|{{ turn['role'] }}|>{{ turn['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def tokenizer(chat: bool = True, extra: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, BOS in front of plain text; `extra` adds one token to the vocabulary."""
    names = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ([extra] if extra else [])
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def save_model(folder: Path, seed: int = 0, num_blocks: int = 4, width: int = 16, chat: bool = True) -> Path:
    """A random Llama of `num_blocks` blocks with its tokenizer, saved as a model folder."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def save_adapter(model: Path, folder: Path, blocks: list[int] | None = None) -> Path:
    """A LoRA adapter with random, not zero, B matrices, of all blocks or of some."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=blocks, init_lora_weights=False)
    get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder
