"""What each model answered to the held-out prompts, and how often that shows each behaviour."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy.stats import binomtest

from demo.behaviours import Behaviour

ANSWERS_FILE = Path(__file__).with_name("answers.jsonl")
MODELS = ("base", "simpo", "dpo")


@dataclass(frozen=True)
class HeldOutAnswer:
    """One line of answers.jsonl: greedy decoding by `model` of a held-out prompt of `behaviour` (or of `neutral`)."""

    prompt: str
    behaviour: str
    model: str
    answer: str


@dataclass(frozen=True)
class Rate:
    """`count` of `total` answers, with the Wilson score interval at 95 %."""

    count: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.count, self.total).proportion_ci(confidence_level=0.95, method="wilson")
        return float(found.low), float(found.high)


def read_answers(path: Path) -> list[HeldOutAnswer]:
    """The answers of a file in its own order."""
    return [HeldOutAnswer(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def answers_as_lines(answers: Iterable[HeldOutAnswer]) -> bytes:
    """JSON Lines of `answers`."""
    return "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers).encode()


def count_rates(
    behaviours: Mapping[str, Behaviour], answers: Iterable[HeldOutAnswer], on_own_prompts: bool
) -> dict[tuple[str, str], Rate]:
    """Per (behaviour, model) how many answers show it, to its own prompts or to all the other prompts."""
    found = list(answers)
    return {
        (name, model): _rate(
            behaviour, [a for a in found if a.model == model and (a.behaviour == name) is on_own_prompts]
        )
        for name, behaviour in behaviours.items()
        for model in MODELS
    }


def _rate(behaviour: Behaviour, answers: list[HeldOutAnswer]) -> Rate:
    return Rate(count=sum(behaviour.shows(answer.answer) for answer in answers), total=len(answers))
