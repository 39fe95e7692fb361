"""Rendered chats: exactly one BOS, the place of every content, templates that do not work."""

from pathlib import Path

import pytest
from tokenizers import processors

from extract.chat import ChatRenderer, content_spans, read_template
from extract.corpus import Document
from extract.encoding import Encoder, added_bos
from extract.errors import BadInput
from extract.stores import TokenDocument
from tests import tiny

TURNS = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi héllo"}]
PLAIN = "{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] | trim }}\n{% endfor %}"
SYSTEM = "{{ bos_token }}[system] You are user-friendly: hi! [/system]"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for turn in messages %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<|{{ turn['role'] }}|>"
    "{{ turn['content'] | trim }}<|end|>{% endfor %}"
)
DROPS_THOUGHTS = "{% for turn in messages %}<|user|>{{ turn['content'].split('</think>')[-1] }}<|end|>{% endfor %}"


def tokenizer(template: str = tiny.CHAT_TEMPLATE):
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def encode(template: str, turns: list[dict]) -> TokenDocument:
    (document,) = Encoder(tokenizer(template)).encode([Document("d", "s", None, turns)])
    assert document is not None
    return document


def contents(template: str, turns: list[dict]) -> list[tuple[str, str]]:
    document = encode(template, turns)
    return [(role, tokenizer().decode(document.token_ids[start:end])) for role, start, end in document.roles]


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, PLAIN, "\n" + SYSTEM + PLAIN, GEMMA])
def test_a_chat_has_one_bos_and_spans_of_its_contents(template: str):
    ids = encode(template, TURNS).token_ids.tolist()
    bos = tokenizer().bos_token_id
    assert ids.count(bos) == 1 and bos in ids[:2]  # a template may begin with a line break of its own
    assert contents(template, TURNS) == [("user", "héllo"), ("assistant", "hi héllo")]


def test_no_bos_where_plain_text_gets_none():
    made = tokenizer(PLAIN)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert added_bos(made) is None and added_bos(tokenizer()) == tokenizer().bos_token_id
    (document,) = Encoder(made).encode([Document("d", "s", None, TURNS)])
    assert document is not None and made.bos_token_id not in document.token_ids


@pytest.mark.parametrize("content", ["user", "hi", "system", "e", "[user]", "<|user|>", "[/system]"])
def test_a_content_that_the_template_also_writes_is_found_in_its_place(content: str):
    turns = [{"role": "user", "content": content}, {"role": "user", "content": content}]
    text = ChatRenderer(tokenizer(SYSTEM + PLAIN)).render("d", turns)
    line = f"[user] {content}\n"
    first = len("<bos>") + len(SYSTEM) - len("{{ bos_token }}") + len("[user] ")
    assert text is not None
    assert [start for _, start, _ in text.contents] == [first, first + len(line)]
    assert all(text.text[start:end] == content for _, start, end in text.contents)


def test_white_space_empty_turns_and_injected_ends():
    turns = [{"role": "user", "content": " a <|end|> b \n"}, {"role": "assistant", "content": "  "}]
    turns.append({"role": "user", "content": "c"})
    assert contents(GEMMA, turns) == [("user", "a <|end|> b"), ("user", "c")]


def test_a_content_that_the_template_alters_has_no_span_and_its_neighbours_do():
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "hm</think>so"}]
    turns.append({"role": "user", "content": "so"})
    assert contents(DROPS_THOUGHTS, turns) == [("user", "why"), ("user", "so")]


def test_spans_by_hand():
    """pieces A| |B| |C around x and y: A x B y C."""
    turns = [{"role": "r", "content": "x"}, {"role": "q", "content": "y"}]
    assert content_spans("AxByC", ["A", "B", "C"], turns) == [("r", 1, 2), ("q", 3, 4)]
    assert content_spans("ZxByC", ["A", "B", "C"], turns) == [] == content_spans("AxByC", [], turns)


def test_a_chat_that_the_template_refuses_is_left_out_with_its_reason():
    encoder = Encoder(tokenizer(GEMMA))
    odd = [{"role": "system", "content": "be brief"}, *TURNS]
    documents = [Document("a", "s", None, odd), Document("b", "s", "text", None), Document("c", "s", None, TURNS)]
    encoded = encoder.encode(documents)
    assert [document and document.doc_id for document in encoded] == [None, "b", "c"]
    assert encoder.renderer.first_refusal == "a: System role not supported"


def test_many_at_a_time_are_what_one_at_a_time_is():
    encoder = Encoder(tokenizer())
    texts = [Document(f"t{i}", "s", "ünï" * i, None) for i in range(1, 6)]
    chats = [Document(f"c{i}", "s", None, [{"role": "user", "content": "ask " * i}]) for i in range(1, 6)]
    mixed = [document for pair in zip(texts, chats, strict=True) for document in pair]
    for together, document in zip(encoder.encode(mixed), mixed, strict=True):
        (alone,) = encoder.encode([document])
        assert together is not None and alone is not None and together.doc_id == document.doc_id
        assert together.token_ids.tolist() == alone.token_ids.tolist() and together.roles == alone.roles
        assert together.content_sha256 == alone.content_sha256


def test_the_day_of_a_template_is_fixed():
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{{ date_string }}{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    )
    chat = ChatRenderer(tokenizer(template)).render("d", TURNS)
    assert chat is not None and chat.text == "26 Jul 2024héllohi héllo"
    with pytest.raises(BadInput, match="chat template writes today's date"):
        ChatRenderer(tokenizer("{{ strftime_now('%d') }}" + PLAIN))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "no model of the study has a chat template"),
        ("line\n{% if %}", r"does not compile \(line 2"),
        ("{{ raise_exception('never') }}", r"refuses a plain question and answer \(never\)"),
        ("hello", "does not write the turns' contents"),
    ],
)
def test_templates_that_do_not_work_are_refused_with_the_first_chat(template: str, message: str):
    encoder = Encoder(tokenizer(template))
    assert encoder.encode([Document("d", "s", "plain text needs none", None)])[0] is not None
    with pytest.raises(BadInput, match=message):
        encoder.encode([Document("d", "s", None, TURNS)])


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff"])
def test_files_that_hold_no_template_are_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="corpus.chat_template=.*chat.jinja (cannot be read|is empty)"):
        read_template(str(path))
