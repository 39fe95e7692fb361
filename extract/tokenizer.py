"""The one tokenizer of a study: every model must read the same tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from extract.chat import ChatRenderer, read_template
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.models import load_tokenizer

# Scripts, digits, spaces, case, accents in both normal forms and code: where tokenizers with one vocabulary differ.
PROBE = (
    " The  quick\tbrown fox's 12345 jumps.\r\n\n  def f(x):\n\treturn x**2  # naïve cafe\u0301 ﬁ Ⅷ "
    "Größe ÇA ı İ привет мир 你好，世界 こんにちは مرحبا שלום नमस्ते 안녕 "
    "👩\u200d👧 🇨🇭 \u00a0\u200b… “quoted” DON'T 3.14e-10 "
)

# The parts of a fast tokenizer that decide its tokens; the model has vocabulary and merges.
DECIDING = ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor")


def study_tokenizer(settings: ExtractSettings) -> Any:
    """The tokenizer of the study, with the chat template of `corpus.chat_template`, else of the first model that has
    one (base models often lack one). All models of the study are asked, whichever pair is selected: every pair reads
    the same tokens.

    Raises:
        BadInput: two models whose tokenizers differ: their activations could not be compared token by token; a
            given template that does not work.
    """
    given = read_template(settings.corpus.chat_template) if settings.corpus.chat_template else None
    places = {(model.id, model.revision, model.gguf): name for name, model in reversed(settings.models.items())}
    names = [name for name in settings.models if name in places.values()]  # one name for each set of files
    tokenizers = [load_tokenizer(name, settings.models[name]) for name in names]
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if difference := tokenizer_difference(tokenizers[0], tokenizer):
            raise BadInput(
                f"models.{names[0]} and models.{name} have different tokenizers: {difference}. Their activations could "
                f"not be compared token by token; choose models with one tokenizer."
            )
    if given is not None:
        tokenizers[0].chat_template = given
        ChatRenderer(tokenizers[0])  # refuses one that does not work
        return tokenizers[0]
    return next((tokenizer for tokenizer in tokenizers if tokenizer.chat_template), tokenizers[0])


def tokenizer_difference(first: Any, second: Any) -> str | None:
    """What two tokenizers do not share, in words, or None: vocabulary, merges, or what they make of a text that holds
    many scripts and every special token, with what they add in front and behind.
    """
    different = set(first.get_vocab().items()) ^ set(second.get_vocab().items())
    if different:
        return f"{len(different)} entries of the vocabulary differ, such as {sorted({t for t, _ in different})[:3]}"
    merges = [_merges(tokenizer) for tokenizer in (first, second)]
    for number, (one, other) in enumerate(zip(*merges, strict=False)):
        if one != other:
            return f"merge {number} is {one!r} in the one and {other!r} in the other"
    if len(merges[0]) != len(merges[1]):
        return f"the one has {len(merges[0])} merges, the other {len(merges[1])}"
    special = sorted({**first.added_tokens_encoder, **second.added_tokens_encoder})
    for text in (PROBE, " a ".join(["", *special, ""])):
        if difference := _first_difference(text, first, second):
            return difference
    return None


def _first_difference(text: str, first: Any, second: Any) -> str | None:
    one, other = (tokenizer(text, verbose=False)["input_ids"] for tokenizer in (first, second))
    if one == other:
        return None
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(place - 2, 0)
    shown = [first.convert_ids_to_tokens(ids[start : place + 4]) for ids in (one, other)]
    return f"the same text becomes {len(one)} and {len(other)} tokens; from token {start} on {shown[0]} and {shown[1]}"


def _merges(tokenizer: Any) -> list:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of all that decides which tokens a text becomes, and of the chat template.

    Of the fast tokenizer that is everything but how it decodes, and how it would cut or pad.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {name: parts[name] for name in DECIDING}
    content = json.dumps([deciding, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
