"""The cards of a page: inert, complete, within their bytes; what is cut is cut from the least exclusive ones."""

from __future__ import annotations

import json

from analysis.examples.excerpts import Shown, Span
from analysis.human import HumanLabel
from analysis.report.cards import Card, Histogram, Score
from analysis.report.payload import Payload, payload_of, safe_json

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it again "


def card_of(latent: int, owner: str = "simpo", num_documents: int = 4, text: str = TEXT) -> Card:
    """A card as long as those of a study: descriptions of a few sentences, documents of about 64 tokens."""
    spans = [Span("<|im_start|>user", "template"), Span(2 * text), *(Span(" word", "fired", 1.25) for _ in range(8))]
    return Card(
        anchor=f"base_simpo-{latent}",
        pair="base_simpo",
        latent=latent,
        owner=owner,
        outcome="placed",
        label="lazy dogs",
        pattern=text,
        description=3 * text,
        confidence="high",
        reason=text,
        annotator="a-model",
        category="Creative Generation",
        group="Specialized Capabilities",
        similarity=float("nan"),
        delta_norm=1.0,
        nu_error=-0.012345,
        nu_reconstruction=0.3,
        nu_error_range=(-0.02, 0.01),
        nu_reconstruction_range=None,
        frequency=0.00012345,
        num_documents=5,
        max_activation=12.3456,
        dedicated=False,
        histogram=Histogram(0.5, [3, 2, 1]),
        shares={"template": 0.123, "role user": 0.877},
        twins=[7],
        scores=[Score("detection", 0.75, 0.6, 0.9)],
        human=None,
        documents=[Shown("prose", "", 1.25, spans) for _ in range(num_documents)],
    )


def packed(cards: list[Card], budget: int = 10**9, first: set[str] | None = None) -> tuple[Payload, dict[int, dict]]:
    payload = payload_of(cards, first or set(), lambda owner: "1,2,3", budget)
    data = json.loads(payload.text)
    rows = [dict(zip(data["columns"], values, strict=True)) for values in data["cards"]]
    return payload, {row["latent"]: row | data["owners"][row["of"]] for row in rows}


def test_numbers_and_texts_come_back() -> None:
    _, found = packed([card_of(5)])
    card = found[5]
    assert (card["owner"], card["pair"], card["rgb"], card["label"]) == ("simpo", "base_simpo", "1,2,3", "lazy dogs")
    assert (card["error"], card["frequency"], card["similarity"]) == (-0.01235, 0.0001234, None)
    assert (card["errorRange"], card["reconstructionRange"]) == ([-0.02, 0.01], None)
    assert (card["scores"], card["twins"]) == ([["detection", 0.75, 0.6, 0.9]], [7])
    assert (card["histogram"], card["shares"]) == ([0.5, [3, 2, 1]], [["template", 0.12], ["role user", 0.88]])
    source, _, strongest, pieces = card["documents"][0]
    assert (source, strongest, pieces[0], pieces[2]) == ("prose", 1.25, ["<|im_start|>user"], [" word", 1.25])


def test_nothing_can_end_the_script_that_holds_it() -> None:
    hostile = "</script><!-- <script> & \u2028 \ud800 ]]> 🦊"
    text = safe_json({"a": hostile})
    assert not set("<>&\u2028") & set(text) and text.encode()
    assert json.loads(text) == {"a": hostile} and "🦊" in text


def test_thousands_of_latents_fit_the_page_with_all_their_documents() -> None:
    payload, found = packed([card_of(latent) for latent in range(5000)], 19_000_000)
    assert (payload.num_cards, payload.num_left_out, payload.num_shortened) == (5000, 0, 0)
    assert len(payload.text.encode()) < 19_000_000
    assert all(len(card["documents"]) == 4 for card in found.values())


def test_documents_are_cut_from_the_tail_before_any_card_is() -> None:
    cards = [card_of(latent, owner) for owner in ("base", "simpo") for latent in range(100)]
    cards = [card if card.owner == "simpo" else card_of(100 + card.latent, "base") for card in cards]
    whole = len(packed(cards)[0].text)
    payload, found = packed(cards, whole * 2 // 3)
    assert len(payload.text.encode()) <= whole * 2 // 3 and payload.num_left_out == 0
    numbers = {
        owner: [len(c["documents"]) for c in found.values() if c["owner"] == owner] for owner in ("base", "simpo")
    }
    assert payload.num_shortened == sum(number < 4 for both in numbers.values() for number in both) > 0
    for own in numbers.values():  # exclusive ones keep more, none has two documents more than another
        assert own == sorted(own, reverse=True) and max(own) - min(own) <= 1


def test_cards_that_do_not_fit_are_the_least_exclusive_ones_that_nothing_names() -> None:
    cards = [card_of(latent, num_documents=1) for latent in range(100)]
    payload, found = packed(cards, 40_000, first={"base_simpo-99"})
    assert 0 < payload.num_cards == len(found) < 100 and payload.num_left_out == 100 - len(found)
    assert list(found) == [*range(len(found) - 1), 99]
    assert len(payload.text.encode()) <= 40_000
    assert packed([], 0)[0].num_cards == 0


def test_what_a_person_says_is_carried() -> None:
    human = HumanLabel(5, "dogs", "", "sure", "Ada", "2026-01-01T00:00:00+00:00")
    card = card_of(5)
    _, found = packed([Card(**{**vars(card), "human": human})])
    assert found[5]["human"] == {"label": "dogs", "category": "", "note": "sure", "who": "Ada"}
