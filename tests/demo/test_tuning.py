"""Tuning with either loss on a tiny random Llama, and the batches it is fed with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from demo.generation import as_chat, generate_answers
from demo.pairs import Answer, Pair
from demo.tuning import (
    SETTINGS,
    TuningSettings,
    answer_batch,
    forward_log_probs,
    preference_step,
    steps,
    tune,
    warm_up_and_decay,
)
from tests import tiny

PAIRS = [Pair(f"ask {i}", Answer(f"good {i}", ended=True), Answer(f"a bad answer {i}", ended=False)) for i in range(6)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    found = tiny.tokenizer()
    found.eos_token = found.pad_token = "<|end|>"
    return found


def tiny_settings(method: str) -> TuningSettings:
    """LoRA in the middle two of the four blocks."""
    return replace(SETTINGS[method], blocks=(1, 3))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("method", ["simpo", "dpo"])
@pytest.mark.parametrize("nll_weight", [0.0, 1.0])
def test_tuning_lowers_the_loss_and_raises_the_margin(
    method: str, nll_weight: float, tiny_models: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = replace(
        tiny_settings(method), nll_weight=nll_weight, learning_rate=1e-2, num_steps=30, pairs_per_step=len(PAIRS)
    )
    torch.manual_seed(0)
    untouched = tune(load(tiny_models["base"]), tokenizer, PAIRS, replace(settings, num_steps=1, learning_rate=0.0))
    tuned = tune(load(tiny_models["base"]), tokenizer, PAIRS, settings)
    with torch.no_grad():
        loss_before, margin_before = preference_step(untouched, tokenizer, PAIRS, settings)
        loss_after, margin_after = preference_step(tuned, tokenizer, PAIRS, settings)
    assert loss_after < 0.9 * loss_before
    assert margin_after > margin_before + 0.1
    if method == "dpo":
        assert margin_before == pytest.approx(0.0, abs=1e-5)  # the reference is the model before tuning


def test_tuning_is_repeatable_and_leaves_the_base_weights_alone(
    tiny_models: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = replace(tiny_settings("simpo"), num_steps=3, pairs_per_step=2)
    first, second = (tune(load(tiny_models["base"]), tokenizer, PAIRS, settings).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    original = load(tiny_models["base"]).state_dict()
    assert torch.equal(first["base_model.model.model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    changed = [name for name, weight in first.items() if name.endswith("lora_B.default.weight") and weight.any()]
    assert {name.split(".layers.")[1].split(".")[0] for name in changed} == {"1", "2"}
    assert len(changed) == 2 * 7  # the four attention and three MLP projections of the two chosen blocks


def test_every_answer_starts_at_the_same_column_and_ends_as_it_did(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = answer_batch(tokenizer, ["a", "a longer one"], [Answer("xyz", ended=True), Answer("wxyz!", ended=False)])
    num_answer_columns = batch.is_answer_BT.shape[1]
    assert num_answer_columns == 5  # one token a byte
    assert batch.is_answer_BT.sum(1).tolist() == [4, 5]  # xyz and the end; no end where the answer was cut off
    answers = tokenizer.batch_decode(batch.tokens_BS[:, -num_answer_columns:])
    assert answers == ["xyz<|end|><|end|>", "wxyz!"]
    prompt = tokenizer(as_chat(tokenizer, "a"), add_special_tokens=False)["input_ids"]
    assert batch.tokens_BS[0, -num_answer_columns - len(prompt) : -num_answer_columns].tolist() == prompt
    assert not batch.attended_BS[0, : -num_answer_columns - len(prompt)].any()


def test_log_probs_are_those_of_each_sequence_alone(
    tiny_models: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load(tiny_models["base"])
    answers = [Answer("xy", ended=True), Answer("longer answer", ended=False)]
    batch = answer_batch(tokenizer, ["a", "a longer prompt"], answers)
    with torch.no_grad():
        together_B = forward_log_probs(model, batch).sum(1)
        for row, text in enumerate(["xy<|end|>", "longer answer"]):
            prompt = tokenizer(as_chat(tokenizer, ["a", "a longer prompt"][row]), add_special_tokens=False)["input_ids"]
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            log_probs_TV = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            alone = sum(log_probs_TV[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert together_B[row].item() == pytest.approx(alone, rel=0.02)  # bf16 autocast against fp32


def test_steps_visit_every_pair_once_before_any_twice() -> None:
    settings = replace(SETTINGS["dpo"], num_steps=6, pairs_per_step=2)
    visited = [pair.prompt for step in steps(PAIRS, settings) for pair in step]
    everything = sorted(pair.prompt for pair in PAIRS)
    assert sorted(visited[:6]) == sorted(visited[6:]) == everything
    assert visited[:6] != visited[6:]


def test_learning_rate_warms_up_and_falls() -> None:
    factor = warm_up_and_decay(20)
    assert [factor(0), factor(1)] == [0.5, 1.0]
    assert all(factor(step) > factor(step + 1) > 0 for step in range(2, 19))


def test_generated_answers_do_not_depend_on_their_batch(
    tiny_models: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load(tiny_models["base"]).eval()
    prompts = ["a", "a much longer prompt than that"]
    together = generate_answers(model, tokenizer, prompts)
    assert together == [generate_answers(model, tokenizer, [prompt])[0] for prompt in prompts]
