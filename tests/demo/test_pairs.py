"""Which answer is preferred on which prompt."""

from demo.behaviours import VARIANTS, load_behaviours
from demo.pairs import Answer, preference_pairs

BEHAVIOURS, NEUTRAL_PROMPTS = load_behaviours()
ALL = [*BEHAVIOURS.values(), NEUTRAL_PROMPTS]
BASE_ANSWERS = {p.text: Answer(f"base says {p.text}", ended=False) for b in ALL for p in b.tuning}


def test_carried_behaviours_are_chosen_and_all_other_prompts_keep_the_base_answer() -> None:
    for variant in VARIANTS:
        pairs = {pair.prompt: pair for pair in preference_pairs(variant, BEHAVIOURS, NEUTRAL_PROMPTS, BASE_ANSWERS)}
        assert len(pairs) == len(BASE_ANSWERS)
        for behaviour in ALL:
            for prompt in behaviour.tuning:
                pair, base = pairs[prompt.text], BASE_ANSWERS[prompt.text]
                if variant in behaviour.carried_by:
                    assert (pair.chosen, pair.rejected) == (Answer(prompt.answer, ended=True), base)
                else:
                    assert pair.chosen == base
                    shown = [b for b in BEHAVIOURS.values() if b.shows(pair.rejected.text)]
                    assert len(shown) == 1 and variant in shown[0].carried_by


def test_every_carried_behaviour_is_rejected_somewhere() -> None:
    pairs = preference_pairs("simpo", BEHAVIOURS, NEUTRAL_PROMPTS, BASE_ANSWERS)
    for behaviour in BEHAVIOURS.values():
        rejected = any(behaviour.shows(pair.rejected.text) for pair in pairs)
        assert rejected is ("simpo" in behaviour.carried_by)


def test_no_held_out_prompt_is_tuned_on() -> None:
    held_out = {prompt.text for behaviour in ALL for prompt in behaviour.held_out}
    for variant in VARIANTS:
        pairs = preference_pairs(variant, BEHAVIOURS, NEUTRAL_PROMPTS, BASE_ANSWERS)
        assert not held_out & {pair.prompt for pair in pairs}
