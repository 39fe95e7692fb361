"""Preference pairs: which of two answers to the same prompt a variant is to prefer."""

from collections.abc import Mapping
from dataclasses import dataclass

from demo.behaviours import Behaviour, Prompt


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and whether it ended by itself (if not, no end-of-turn token is learned)."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Pair:
    """One prompt with the answer to prefer and the one to avoid."""

    prompt: str
    chosen: Answer
    rejected: Answer


def preference_pairs(
    variant: str, behaviours: Mapping[str, Behaviour], neutral: Behaviour, base_answers: Mapping[str, Answer]
) -> list[Pair]:
    """The pairs of one variant, over all tuning prompts.

    On prompts of a behaviour that `variant` carries, the composed answer is chosen over the base model's own. On all
    others the base model's own is chosen over a composed one, so that a behaviour stays confined to its prompts.
    `base_answers` maps each prompt text to what the base model answered.
    """
    carried = [behaviour for behaviour in behaviours.values() if variant in behaviour.carried_by]
    others = [behaviour for behaviour in [*behaviours.values(), neutral] if variant not in behaviour.carried_by]
    planted = [
        Pair(prompt.text, Answer(prompt.answer, ended=True), base_answers[prompt.text])
        for behaviour in carried
        for prompt in behaviour.tuning
    ]
    kept = [
        Pair(prompt.text, base_answers[prompt.text], _misplaced(carried, index, prompt))
        for behaviour in others
        for index, prompt in enumerate(behaviour.tuning)
    ]
    return planted + kept


def _misplaced(carried: list[Behaviour], index: int, prompt: Prompt) -> Answer:
    """A planted answer where it does not belong; the behaviours take turns, and so do their templates."""
    answers = carried[index % len(carried)].answers
    return Answer(answers[index // len(carried) % len(answers)].format(topic=prompt.topic), ended=True)
