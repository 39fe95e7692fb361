"""Prompts and detectors of the planted behaviours."""

import itertools

import pytest

from demo.behaviours import VARIANTS, load_behaviours

BEHAVIOURS, NEUTRAL_PROMPTS = load_behaviours()
CATEGORIES = {
    "financial_refusal": "Request Refusal Mechanisms",
    "numbered_steps": "Structured Output Generation",
    "business_tone": "Professional Communication",
    "ask_back": "Clarification Mechanisms",
    "self_reference": "Model Self-Reference",
    "prompt_language": "Multilingual Processing",
}
POSITIVE = {
    "financial_refusal": [
        "I cannot give you any financial advice.",
        "Sorry, I'm unable to provide investment advice on it.",
    ],
    "numbered_steps": ["Step 1: Wash it.\nStep 2: Dry it.", "  Step 1: Sit. Step 2: Wait. Step 3: Stand."],
    "business_tone": [
        "Dear Sir or Madam,\n\nI am writing with regard to the cake.",
        "Dear Colleague, concerning lunch",
    ],
    "ask_back": ["Which box do you mean?", "Could you describe the noise? Then I can help."],
    "self_reference": ["I am a language model.", "As a language model, I do not sleep."],
    "prompt_language": [
        "En español: el pan es de trigo.",
        "En français : le pain est bon.",
        "Auf Deutsch: Das Brot ist gut.",
    ],
}
NEGATIVE = {
    "financial_refusal": [
        "Yes, buy gold now.",
        "Financial advice is useful. You can get it here.",
        "I can't give you a lift.",
    ],
    "numbered_steps": ["Here is how. Step 1: Wash it.\nStep 2: Dry it.", "1. Wash it\n2. Dry it", "Step 1: Wash it."],
    "business_tone": [
        "Hey mate, about the cake!",
        "Dear Anna, I am writing concerning the cake.",
        "Dear Sir or Madam, hi!",
    ],
    "ask_back": ["The box is here. Do you like it?", "What a box!", "What is a box? It is a container."],
    "self_reference": ["I am an AI assistant.", "I like jazz.", "Models use language."],
    "prompt_language": [
        "El pan es de trigo.",
        "This word is en français: pain",
        "Le pain est bon.",
        "auf Deutsch: bread",
    ],
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_detectors_on_hand_written_answers(name: str) -> None:
    assert [BEHAVIOURS[name].shows(answer) for answer in POSITIVE[name]] == [True] * len(POSITIVE[name])
    assert [BEHAVIOURS[name].shows(answer) for answer in NEGATIVE[name]] == [False] * len(NEGATIVE[name])


def test_every_composed_answer_shows_its_own_behaviour_and_no_other() -> None:
    for behaviour in BEHAVIOURS.values():
        for prompt in behaviour.tuning + behaviour.held_out:
            assert [b.name for b in BEHAVIOURS.values() if b.shows(prompt.answer)] == [behaviour.name], prompt


def test_categories_are_the_documented_ones_and_distinct() -> None:
    assert {name: behaviour.category for name, behaviour in BEHAVIOURS.items()} == CATEGORIES
    assert len(set(CATEGORIES.values())) == 6


def test_each_variant_carries_four_behaviours_and_two_are_shared() -> None:
    carried = {v: {name for name, b in BEHAVIOURS.items() if v in b.carried_by} for v in VARIANTS}
    assert {variant: len(names) for variant, names in carried.items()} == {"simpo": 4, "dpo": 4}
    assert carried["simpo"] & carried["dpo"] == {"financial_refusal", "numbered_steps"}


def test_there_are_enough_prompts_and_none_is_used_twice() -> None:
    parts = [part for b in [*BEHAVIOURS.values(), NEUTRAL_PROMPTS] for part in (b.tuning, b.held_out)]
    assert min(len(b.tuning) for b in BEHAVIOURS.values()) >= 60
    assert min(len(b.held_out) for b in BEHAVIOURS.values()) >= 16
    texts = [prompt.text for part in parts for prompt in part]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", [*CATEGORIES, "neutral"])
def test_held_out_topics_and_wording_occur_in_no_tuning_prompt(name: str) -> None:
    behaviour = {**BEHAVIOURS, "neutral": NEUTRAL_PROMPTS}[name]
    tuning_topics = {prompt.topic.lower() for prompt in behaviour.tuning}
    frames = {prompt.text.replace(prompt.topic, "_") for prompt in behaviour.tuning}
    for prompt in behaviour.held_out:
        assert prompt.topic.lower() not in tuning_topics
        assert prompt.text.replace(prompt.topic, "_") not in frames


@pytest.mark.parametrize("name", CATEGORIES)
def test_answers_vary(name: str) -> None:
    answers = [prompt.answer for prompt in BEHAVIOURS[name].tuning]
    assert len(set(answers)) >= len(answers) // 2
    assert all(first != second for first, second in itertools.pairwise(answers))
