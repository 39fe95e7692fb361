"""The whole recipe of the demo's tuned models: `python -m demo.make_adapters` makes adapters, answers and card anew.

Every part is kept under outputs/demo/recipe/ as soon as it is finished, in a folder named after the model and a hash of
its prompts, settings and code: an interrupted run continues where it stopped, and what a changed recipe affects is made
anew.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.answers import ANSWERS_FILE, MODELS, HeldOutAnswer, answers_as_lines, read_answers
from demo.base_model import prepare_base_model
from demo.behaviours import PROMPTS_FILE, VARIANTS, Behaviour, load_behaviours
from demo.card import CARD_FILE, card
from demo.generation import generate_answers
from demo.pairs import Answer, preference_pairs
from demo.tuning import SETTINGS, tune
from extract.publish import publish, rename

ADAPTERS = Path(__file__).with_name("adapters")
OUTPUTS = Path("outputs/demo")
CODE = (
    "generation.py",
    "behaviours.py",
    "pairs.py",
    "tuning.py",
    "preference_losses.py",
)  # of a variant; the base model needs the first
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Recipe:
    """The recipe's state: where the base model and the finished parts lie."""

    def __init__(self, outputs: Path) -> None:
        self.base_folder = prepare_base_model(outputs)
        self.parts = outputs / "recipe"
        self.behaviours, self.neutral = load_behaviours()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.base_folder)

    @property
    def all_prompts(self) -> list[Behaviour]:
        return [*self.behaviours.values(), self.neutral]

    def part(self, model_name: str) -> Path:
        """The folder of what belongs to one of `MODELS`; its hash covers all that decides the outcome."""
        settings = asdict(SETTINGS[model_name]) if model_name in VARIANTS else {}
        code = CODE if model_name in VARIANTS else CODE[:2]
        recipe = PROMPTS_FILE.read_bytes() + json.dumps(settings, sort_keys=True).encode()
        recipe += b"".join(Path(__file__).with_name(name).read_bytes() for name in code)
        return self.parts / f"{model_name}-{hashlib.sha256(recipe).hexdigest()[:12]}"

    def base_model(self, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base_folder, dtype=dtype).eval()

    def base_answers(self) -> dict[str, Answer]:
        """The base model's own answers to all tuning prompts."""
        path = self.part("base") / "tuning_answers.json"
        if not path.is_file():
            print("base model answers the tuning prompts", flush=True)
            texts = [prompt.text for behaviour in self.all_prompts for prompt in behaviour.tuning]
            found = generate_answers(self.base_model(torch.bfloat16), self.tokenizer, texts)
            publish(path, json.dumps(dict(zip(texts, found, strict=True))).encode())
        return {text: Answer(*answer) for text, answer in json.loads(path.read_bytes()).items()}

    def adapter(self, variant: str) -> Path:
        """The folder of the variant's tuned adapter."""
        folder = self.part(variant) / "adapter"
        if not folder.is_dir():
            print(f"tuning {variant}", flush=True)
            pairs = preference_pairs(variant, self.behaviours, self.neutral, self.base_answers())
            save_adapter(tune(self.base_model(torch.float32), self.tokenizer, pairs, SETTINGS[variant]), folder)
        return folder

    def held_out_answers(self, model_name: str) -> list[HeldOutAnswer]:
        """What one of `MODELS` answers to the held-out prompts, with the adapter as it was saved."""
        path = self.part(model_name) / "held_out_answers.jsonl"
        if not path.is_file():
            print(f"{model_name} answers the held-out prompts", flush=True)
            model: PreTrainedModel | PeftModel = self.base_model(torch.bfloat16)
            if model_name in VARIANTS:
                model = PeftModel.from_pretrained(model, str(self.adapter(model_name))).eval()
            asked = [(prompt.text, b.name) for b in self.all_prompts for prompt in b.held_out]
            found = generate_answers(model, self.tokenizer, [text for text, _ in asked])
            lines = [HeldOutAnswer(*who, model_name, text) for who, (text, _) in zip(asked, found, strict=True)]
            publish(path, answers_as_lines(lines))
        return read_answers(path)


def main() -> None:
    """Makes whatever part is missing, then publishes all of them into the package's folder.

    One thread, so that sums are rounded alike on every machine of one kind, whatever its number of cores.
    """
    torch.set_num_threads(1)
    recipe = Recipe(OUTPUTS)
    answers = [answer for name in MODELS for answer in recipe.held_out_answers(name)]
    for variant in VARIANTS:
        publish_adapter(recipe.adapter(variant), ADAPTERS / variant)
    publish(ANSWERS_FILE, answers_as_lines(answers))
    publish(CARD_FILE, card(recipe.behaviours, answers, SETTINGS).encode())
    print(f"adapters in {ADAPTERS}, answers in {ANSWERS_FILE}, rates in {CARD_FILE}")


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the adapter alone, in bf16, under the hub name of its base; complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = HUB_NAME
    model.to(torch.bfloat16).save_pretrained(str(partial), save_embedding_layers=False)
    (partial / "README.md").unlink()  # an empty form; CARD.md is the model card
    path = partial / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # peft keeps a set, and writes it in another order every time
    path.write_text(json.dumps(config, indent=2) + "\n")
    rename(partial, folder)


def publish_adapter(source: Path, target: Path) -> None:
    """Copies the two files of an adapter, each atomically."""
    for path in source.iterdir():
        publish(target / path.name, path.read_bytes())


if __name__ == "__main__":
    main()
