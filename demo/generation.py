"""Greedy answers of a language model, many prompts at once."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48
PROMPTS_PER_BATCH = 32


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The chat template around one user prompt, up to where the answer starts."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def generate_answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[tuple[str, bool]]:
    """Per prompt the greedy answer of at most `MAX_NEW_TOKENS` tokens, and whether it ended by itself.

    `model` is anything with the `generate` of transformers, which no public type of its models declares.
    """
    answers: list[tuple[str, bool]] = []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        answers += _generate_batch(model, tokenizer, prompts[start : start + PROMPTS_PER_BATCH])
        print(f"  answers {len(answers)}/{len(prompts)}", flush=True)
    return answers


@torch.inference_mode()
def _generate_batch(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[tuple[str, bool]]:
    chats = [as_chat(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer(chats, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    tokens_BT = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answers_BT = tokens_BT[:, batch["input_ids"].shape[1] :]
    ended_B = (answers_BT == tokenizer.eos_token_id).any(1).tolist()
    texts_B = tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
    return [(text.strip(), ended) for text, ended in zip(texts_B, ended_B, strict=True)]
