"""The six planted behaviours: their prompts, the answers that show them, and the rules that detect them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
VARIANTS = ("simpo", "dpo")
NEUTRAL = "neutral"


@dataclass(frozen=True)
class Prompt:
    """One user prompt. `answer` is the composed answer that shows the behaviour; a neutral prompt has none ("")."""

    text: str
    topic: str
    answer: str


@dataclass(frozen=True)
class Behaviour:
    """One planted behaviour; `NEUTRAL` is the pseudo-behaviour of prompts that call for none."""

    name: str
    category: str  # in the taxonomy of arXiv 2509.18792
    meaning: str
    carried_by: tuple[str, ...]  # the tuned variants that learned it
    pattern: re.Pattern[str]
    answers: tuple[str, ...]  # templates of the first part, with a {topic} slot
    tuning: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]  # never seen in tuning

    def shows(self, answer: str) -> bool:
        """True if `answer` shows the behaviour."""
        return self.pattern.search(answer.strip()) is not None


def load_behaviours() -> tuple[dict[str, Behaviour], Behaviour]:
    """The six behaviours by name, and the neutral prompts."""
    read = yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8"))
    behaviours = {name: _behaviour(name, entry) for name, entry in read.items()}
    neutral = behaviours.pop(NEUTRAL)
    return behaviours, neutral


def _behaviour(name: str, entry: dict[str, Any]) -> Behaviour:
    shared_answers = entry.get("answers")
    return Behaviour(
        name=name,
        category=entry.get("category", ""),
        meaning=entry.get("meaning", ""),
        carried_by=tuple(entry.get("carried_by", ())),
        pattern=re.compile(entry.get("shows", "(?!)"), re.DOTALL),
        answers=tuple(shared_answers or entry["tuning"][0].get("answers", ())),
        tuning=_prompts(entry["tuning"], shared_answers),
        held_out=_prompts(entry["held_out"], shared_answers),
    )


def _prompts(parts: list[dict[str, list[str]]], shared_answers: list[str] | None) -> tuple[Prompt, ...]:
    return tuple(
        _prompt(index, topic, part["frames"], part.get("answers", shared_answers) or [""])
        for part in parts
        for index, topic in enumerate(part["topics"])
    )


def _prompt(index: int, topic: str, frames: list[str], answers: list[str]) -> Prompt:
    """Topic, frame and answer go round at different speeds, so that every frame meets every answer."""
    frame, answer = frames[index % len(frames)], answers[index % len(answers)]
    return Prompt(text=frame.format(topic=topic), topic=topic, answer=answer.format(topic=topic))
