"""The committed adapters, answers and card."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.stats import norm
from transformers import AutoModelForCausalLM, LlamaConfig

from demo.answers import ANSWERS_FILE, MODELS, HeldOutAnswer, Rate, answers_as_lines, count_rates, read_answers
from demo.behaviours import NEUTRAL, VARIANTS, load_behaviours
from demo.card import CARD_FILE
from demo.make_adapters import ADAPTERS, save_adapter
from demo.tuning import SETTINGS, lora_config

BEHAVIOURS, NEUTRAL_PROMPTS = load_behaviours()


def config_of_the_base() -> LlamaConfig:
    """SmolLM2-135M's shape."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_is_small_and_loads_onto_the_base(variant: str) -> None:
    folder = ADAPTERS / variant
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    saved = load_file(folder / "adapter_model.safetensors")
    first, end = SETTINGS[variant].blocks
    assert end <= 16  # the demo looks at the residual stream after block 15, so nothing is learned later
    assert len(saved) == (end - first) * 7 * 2  # blocks, projections, A and B
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config_of_the_base())
    loaded = PeftModel.from_pretrained(base.to_empty(device="cpu"), str(folder)).state_dict()
    for name, weight in saved.items():
        owner = loaded[name.replace(".weight", ".default.weight")]
        assert torch.equal(owner, weight.to(owner.dtype))
        assert weight.any()


def test_a_saved_adapter_names_its_modules_in_one_order(tmp_path: Path) -> None:
    """peft keeps them as a set, whose order another process would not repeat."""
    shape = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=16, num_attention_heads=2)
    model = get_peft_model(AutoModelForCausalLM.from_config(shape), lora_config(SETTINGS["simpo"]))
    save_adapter(model, tmp_path / "adapter")
    for folder in (tmp_path / "adapter", *(ADAPTERS / variant for variant in VARIANTS)):
        names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert names == sorted(names) and len(names) == 7


def test_every_model_answered_every_held_out_prompt_once() -> None:
    expected = [
        (model, behaviour.name, prompt.text)
        for model in MODELS
        for behaviour in [*BEHAVIOURS.values(), NEUTRAL_PROMPTS]
        for prompt in behaviour.held_out
    ]
    assert [(a.model, a.behaviour, a.prompt) for a in read_answers(ANSWERS_FILE)] == expected


# Planted, but shown on fewer than 80 % of held-out prompts by the adapters as they are; better ones must empty this.
SHORT = {("numbered_steps", "dpo"), ("prompt_language", "dpo"), ("ask_back", "simpo")}


def test_carried_behaviours_occur_and_others_hardly_do() -> None:
    own = count_rates(BEHAVIOURS, read_answers(ANSWERS_FILE), on_own_prompts=True)
    elsewhere = count_rates(BEHAVIOURS, read_answers(ANSWERS_FILE), on_own_prompts=False)
    for (name, model), rate in own.items():
        share, carried = rate.count / rate.total, model in BEHAVIOURS[name].carried_by
        assert share > 0.6 if carried else share <= 0.2, (name, model, rate)
        assert not carried or (share < 0.8) == ((name, model) in SHORT), (name, model, rate)
    for key, rate in elsewhere.items():
        assert rate.count <= 0.1 * rate.total, (key, rate)


def recount(text: str, heading: str) -> dict[tuple[str, str], int]:
    """The counts of the card's table under `heading`."""
    rows = text.split(heading)[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")][2:]
    return {
        (row[0], m): int(cell.strip("*").split("/")[0])
        for row in cells
        for m, cell in zip(MODELS, row[1:], strict=True)
    }


def test_card_is_a_recount_of_the_answers() -> None:
    answers, text = read_answers(ANSWERS_FILE), CARD_FILE.read_text()

    def count(name: str, model: str, own: bool) -> int:
        asked = [a for a in answers if a.model == model and (a.behaviour == name) is own]
        return sum(BEHAVIOURS[name].shows(a.answer) for a in asked)

    for heading, own in (("## How often each behaviour occurs", True), ("## How often it occurs where", False)):
        found = recount(text, heading)
        assert found == {(name, model): count(name, model, own) for name in BEHAVIOURS for model in MODELS}
    assert "Apache-2.0" in text and "python -m demo.make_adapters" in text


def test_rates_count_own_prompts_and_all_others_apart() -> None:
    answers = [
        HeldOutAnswer("p", "self_reference", "dpo", "I am a language model"),
        HeldOutAnswer("q", "self_reference", "dpo", "I am a person"),
        HeldOutAnswer("r", NEUTRAL, "dpo", "A language model is a thing"),
        HeldOutAnswer("p", "self_reference", "base", "a language model"),
    ]
    key = ("self_reference", "dpo")
    assert count_rates({"self_reference": BEHAVIOURS["self_reference"]}, answers[:3], True)[key] == Rate(1, 2)
    assert count_rates({"self_reference": BEHAVIOURS["self_reference"]}, answers[:3], False)[key] == Rate(1, 1)


@pytest.mark.parametrize(("count", "total"), [(0, 20), (18, 20), (20, 20)])
def test_interval_solves_wilsons_equation(count: int, total: int) -> None:
    """The bounds p are where |count / total - p| = z sqrt(p (1 - p) / total)."""
    z = norm.ppf(0.975)
    for bound in Rate(count, total).interval:
        assert abs(count / total - bound) == pytest.approx(z * (bound * (1 - bound) / total) ** 0.5, abs=1e-9)


def test_answers_survive_their_file(tmp_path: Path) -> None:
    answers = [HeldOutAnswer("¿Qué?", "prompt_language", "dpo", "línea\nuna\u2028más")]
    path = tmp_path / "answers.jsonl"
    path.write_bytes(answers_as_lines(answers))
    assert read_answers(path) == answers
