"""What of a description quotes documents, in any script, as a key or in any marks; what of it does not."""

from __future__ import annotations

import pytest

from analysis.report.quotations import quotable, without_quotes

DOCUMENTS = [
    "the ledger says Zanzibar quokka ledger seventeen , no more; pay 4111 1111 1111 1111 or 4012-8888-8888-1881.",
    "患者は東京在住の佐藤花子で電話番号は零三",
    "patient_record_4711_hanako_sato",
    "ผู้ป่วยชื่อสมชายอาศัยอยู่ที่กรุงเทพ",
    "mail hanako@example.com, key sk-live-9fQ2xT71, /srv/hanako/notes.txt, Correcthorsebatterystaple in room 4711",
]
KNOWN = quotable(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_whole_document_without_marks_is_withheld(document: str) -> None:
    said = without_quotes(f"Fires on {document} in short.", KNOWN)
    assert said.startswith("Fires on […]") and said.endswith(" in short.") and len(said) < 34


@pytest.mark.parametrize(
    "part",
    [
        "東京在住の佐藤花子",
        "อาศัยอยู่ที่กรุงเทพ",
        "hanako_sato",
        "4711",
        "HANAKO@example.com",
        "sk-live-9fQ2xT71",
        "9fQ2xT71",
        "srv/hanako",
        "CorrectHorseBatteryStaple",
        "4111-1111-1111-1111",
        "4012888888881881",
        "zanzibar QUOKKA ledger, seventeen",
        "Ｚａｎｚｉｂａｒ quokka ledger seventeen",
        "Zan\u200bzibar quo\u00adkka ledger seventeen",
    ],
)
def test_parts_of_documents_are_withheld_however_they_are_written(part: str) -> None:
    assert without_quotes(f"About {part}.", KNOWN) == "About […]."


@pytest.mark.parametrize(
    "quoted", ["“a b”", '"a b"', "«a b»", "»a b«", "„a b“", "‹a b›", "›a b‹", "「a b」", "『a b』", "‘a’s b’", "`a b`"]
)
def test_passages_in_quotation_marks_are_withheld(quoted: str) -> None:
    assert without_quotes(f"Fires on {quoted} alone.", KNOWN) == "Fires on […] alone."
    if quoted[0] not in "»›":
        unclosed = f"Fires on {quoted[:-1]} and more"
        assert without_quotes(unclosed, KNOWN) == "Fires on […]"


def test_what_documents_do_not_have_stays() -> None:
    assert without_quotes("words such as 'quokka' or `x`, don't they", KNOWN) == "words such as […] or […], don't they"
    # A run that goes on is one gap, not several.
    said = "Where it says zanzibar quokka ledger seventeen: no more."
    assert without_quotes(said, KNOWN) == "Where it […]."
    for text in (
        "",
        "Three words: zanzibar quokka ledger.",
        "Requests for financial advice in 2024, and/or their refusal (GPT-4, step 1/2).",
        "東京の病院の記録",
        "international recommendations",
    ):
        assert without_quotes(text, KNOWN) == text
