"""What a number of ranks must divide so that each reads and computes an equal share, and which numbers would do."""

from __future__ import annotations

from extract.errors import BadInput
from train.config import TrainSettings


def check_ranks(settings: TrainSettings, num_ranks: int) -> None:
    """BadInput where `num_ranks` ranks cannot share the lanes and the tokens of a step, or of a micro-step, equally."""
    training, lanes = settings.training, settings.data.num_lanes
    num_micro_steps = training.num_micro_steps
    parts = num_ranks * num_micro_steps
    problems = []
    if training.num_tokens_per_step % parts:
        each = f"{num_ranks} ranks x training.num_micro_steps={num_micro_steps}"
        problems.append(
            f"training.num_tokens_per_step={training.num_tokens_per_step} is no multiple of {parts} ({each}); nearest: "
            f"{nearest_multiples(training.num_tokens_per_step, parts)}"
        )
    if num_ranks > 1 and lanes % num_ranks:
        nearest = nearest_multiples(lanes, num_ranks)
        problems.append(f"data.num_lanes={lanes} is no multiple of {num_ranks} ranks; nearest: {nearest}")
    if problems:
        others = _other_ranks(training.num_tokens_per_step, num_micro_steps, lanes, num_ranks)
        raise BadInput(f"{'; '.join(problems)}. {others}".strip())


def _other_ranks(num_tokens_per_step: int, num_micro_steps: int, num_lanes: int, num_ranks: int) -> str:
    """Numbers of ranks that these settings allow."""
    fitting = [
        n for n in range(1, num_lanes + 1) if num_lanes % n == 0 and num_tokens_per_step % (n * num_micro_steps) == 0
    ]
    if not fitting:
        return ""
    return f"These settings allow {_around(fitting, num_ranks)} ranks; the result is the same on any number."


def nearest_multiples(number: int, of: int) -> str:
    """The positive multiples of `of` below and above `number`, in words."""
    below = number // of * of
    return " or ".join(str(each) for each in (below, below + of) if each)


def nearest_divisors(number: int, whole: int) -> str:
    """The divisors of `whole` below and above `number`, in words."""
    return _around([each for each in range(1, whole + 1) if whole % each == 0], number)


def _around(numbers: list[int], number: int) -> str:
    near = [*[each for each in numbers if each < number][-1:], *[each for each in numbers if each > number][:1]]
    return " or ".join(map(str, near))
