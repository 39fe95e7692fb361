"""Tokenizers of a study must agree, and an error shows where they do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors

from extract.command import compose
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.tokenizer import study_tokenizer, tokenizer_difference, tokenizer_sha256
from tests import tiny

MERGED = [["t", "h"], ["a", "n"]]


def altered(change: Callable[[dict], Any] = lambda parts: None) -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer with two merges, after a change of its parts."""
    parts = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary.update({"th": len(vocabulary), "an": len(vocabulary) + 1})
    parts["model"]["merges"] = list(MERGED)
    change(parts)
    backend = Tokenizer.from_str(json.dumps(parts))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


def with_part(name: str, value: Any) -> transformers.PreTrainedTokenizerFast:
    made = altered()
    setattr(made.backend_tokenizer, name, value)
    return made


def with_eos(ids: str) -> transformers.PreTrainedTokenizerFast:
    template = processors.TemplateProcessing(single=ids, special_tokens=[("<bos>", 0), ("<|end|>", 4)])
    return with_part("post_processor", template)


def test_equal_tokenizers_have_no_difference():
    assert tokenizer_difference(altered(), altered()) is None
    assert tokenizer_sha256(altered()) == tokenizer_sha256(altered())


def test_names_of_special_tokens_do_not_matter_where_the_text_is_read_alike():
    """Llama-3.1 and its Instruct differ in what they call the end."""
    other = altered()
    other.eos_token = "<|end|>"
    assert tokenizer_difference(altered(), other) is None


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (lambda: tiny.tokenizer(extra="zzz"), "entries of the vocabulary differ, such as"),
        (lambda: altered(lambda parts: parts["model"]["merges"].reverse()), "merge 0 is .*'t', 'h'.*'a', 'n'"),
        (lambda: altered(lambda parts: parts["model"]["merges"].pop()), "the one has 2 merges, the other 1"),
        (lambda: with_part("normalizer", normalizers.NFC()), "the same text becomes"),
        (lambda: with_part("normalizer", normalizers.Lowercase()), "the same text becomes .*'T', 'h'.*'th'"),
        (lambda: with_eos("$A"), "from token 0 on .'<bos>'"),
        (lambda: with_eos("<bos> $A <|end|>"), r"becomes (\d+) and \d+ tokens; .*'<\|end\|>'"),
        (lambda: altered(lambda parts: parts["added_tokens"][2].update(lstrip=True)), "the same text becomes"),
    ],
)
def test_a_difference_is_shown(other: Callable[[], Any], shown: str):
    import re

    difference = tokenizer_difference(altered(), other())
    assert difference and re.search(shown, difference), difference


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny.tokenizer(extra="zzz"),
        lambda: altered(lambda parts: parts["model"]["merges"].reverse()),
        lambda: with_part("normalizer", normalizers.NFC()),
        lambda: with_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: with_eos("<bos> $A <|end|>"),
        lambda: altered(lambda parts: parts["added_tokens"][2].update(lstrip=True)),
    ],
)
def test_what_decides_the_tokens_is_in_the_hash(other: Callable[[], Any]):
    assert tokenizer_sha256(altered()) != tokenizer_sha256(other())


def test_what_does_not_decide_the_tokens_is_not_in_the_hash():
    used = altered()
    used("some text", truncation=True, max_length=3)
    used.backend_tokenizer.decoder = decoders.Fuse()
    assert tokenizer_sha256(used) == tokenizer_sha256(altered())


def test_models_with_different_tokenizers_are_refused(study: list[str], tmp_path: Path):
    other = tiny.save_model(tmp_path / "other")
    tiny.tokenizer(extra="zzz").save_pretrained(other)
    settings = compose(ExtractSettings, [*study, f"models.tuned={other}"])
    with pytest.raises(BadInput, match="models.base and models.tuned have different tokenizers: 1 entries.*zzz"):
        study_tokenizer(settings)


def test_the_template_is_the_given_one_or_that_of_the_first_model_with_one(study: list[str], tmp_path: Path):
    silent = tiny.save_model(tmp_path / "silent", chat=False)
    settings = compose(ExtractSettings, [*study, f"models.base={silent}"])
    assert study_tokenizer(settings).chat_template == tiny.CHAT_TEMPLATE
    file = tmp_path / "own.jinja"
    file.write_text("{% for turn in messages %}{{ turn['content'] }}.{% endfor %}")
    own = study_tokenizer(compose(ExtractSettings, [*study, f"corpus.chat_template={file}"]))
    assert own.chat_template == file.read_text()
    assert tokenizer_sha256(own) != tokenizer_sha256(tiny.tokenizer())
    file.write_text("{% for %}")
    with pytest.raises(BadInput, match="chat template does not compile .line 1"):
        study_tokenizer(compose(ExtractSettings, [*study, f"corpus.chat_template={file}"]))
    with pytest.raises(BadInput, match="corpus.chat_template=.*gone.jinja cannot be read"):
        study_tokenizer(compose(ExtractSettings, [*study, f"corpus.chat_template={tmp_path / 'gone.jinja'}"]))


def test_a_tokenizer_without_a_fast_form_is_refused(study: list[str], tmp_path: Path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(BadInput, match="models.tuned: the tokenizer of .*ByT5Tokenizer. has no fast form"):
        study_tokenizer(compose(ExtractSettings, [*study, f"models.tuned={tmp_path / 'slow'}"]))
