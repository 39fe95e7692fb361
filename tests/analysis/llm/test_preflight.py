"""What cannot be asked is said before anything is paid for, with the setting, its value and the remedy."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import _check_access
from analysis.config import AnalysisConfig, AnalysisSettings, check_analysis
from analysis.expenses import check_expenses
from analysis.llm.asking import ask
from analysis.llm.config import LlmConfig
from analysis.llm.ledger import Ledger
from analysis.llm.preflight import check_access
from analysis.llm.prices import Price, price_of
from analysis.steps import Step, run_steps
from extract.command import compose
from extract.errors import BadInput
from tests.analysis.asked import MODEL, anything, config, estimated, question
from tests.analysis.made_study import make_study
from tests.analysis.messages_stub import MessagesStub


def test_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(
        BadInput, match=r"ANTHROPIC_API_KEY \(analysis\.llm\.key_variable\) is not set.*base_url.*offline"
    ):
        check_access(LlmConfig())
    with pytest.raises(BadInput, match="MY_KEY"):
        check_access(LlmConfig(key_variable="MY_KEY"))


@pytest.mark.parametrize("held", ["", " ", "\n"])
def test_a_blank_key_is_none(monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", held)
    with pytest.raises(BadInput, match="No key"):
        check_access(LlmConfig())


@pytest.mark.parametrize("held", ["sk-se\ncret", "sk-se cret", "sk-se\x01cret", "sk-secret\u00e9"])
def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", held)
    with MessagesStub() as stub, pytest.raises(BadInput, match=r"variable ANTHROPIC_API_KEY holds blanks") as caught:
        check_access(config(stub))
    assert "cret" not in str(caught.value) and not stub.calls


def test_the_line_end_of_a_mounted_key_and_the_path_of_an_address_are_no_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-the-test\n")
    with MessagesStub() as stub:
        check_access(config(stub, base_url=f"{stub.url}/v1/"))
    assert stub.calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "claude-3-opus-20240229"},
            r"analysis\.llm\.model \(claude-3-opus-20240229\) is retired.*claude-haiku-5-5",
        ),
        ({"second_model": "claude-3-opus-20240229"}, r"second_model \(claude-3-opus-20240229\) is retired"),
        ({"model": "claude-sonet"}, r"analysis\.llm\.model \(claude-sonet\) .* claude-sonnet-5-5"),
    ],
)
def test_a_model_that_answers_no_more_or_never_did(changes: dict[str, Any], message: str) -> None:
    with MessagesStub() as stub:
        with pytest.raises(BadInput, match=message):
            check_access(config(stub, **changes))
        assert not stub.bodies


def test_at_the_api_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with MessagesStub() as stub:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", stub.url)
        with pytest.raises(BadInput, match=r"\(claude-haiku-4-5\) does not exist\. Choose one of: claude-sonnet-5-5, "):
            check_access(LlmConfig(model="claude-haiku-4-5"))
        with Ledger(tmp_path / "requests.sqlite") as ledger:
            (answer,) = ask([question(1)], anything, LlmConfig(), ledger)
    # No cache yet: the prefix is written to it.
    usage = answer.usage
    expected = usage["input_tokens"] * 2 + usage["cache_write_tokens"] * 2.5 + usage["output_tokens"] * 10
    assert answer.outcome == "answered" and answer.usd == pytest.approx(expected / 1e6)


def test_a_deprecated_model_is_used_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesStub() as stub:
        check_access(config(stub, model="claude-sonnet-4-5"))
    assert "is deprecated; it retires at 2026-11-30" in capsys.readouterr().out


def test_a_model_without_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    with MessagesStub() as stub:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", stub.url)
        with pytest.raises(
            BadInput, match=r"No price of the model claude-next-6.*\+analysis\.llm\.prices=\{claude-next-6:\["
        ):
            check_access(LlmConfig(model="claude-next-6"))
        check_access(LlmConfig(model="claude-next-6", prices={"claude-next-6": [1.0, 2.0, 3.0, 4.0]}))


@pytest.mark.parametrize("name", ["claude-next-6", "gpt-4.1", "org/Name-2.5", r"llama3\:8b"])
def test_any_model_can_be_given_a_price_on_the_command_line(name: str) -> None:
    settings = compose(AnalysisSettings, ["experiment=demo", f"+analysis.llm.prices={{{name}:[1,2.5,3,4]}}"])
    found = price_of(name.replace("\\", ""), settings.analysis.llm)
    assert found == Price(1, 2.5, 3, 4)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(BadInput, match=rf"the server at {url} \(analysis\.llm\.base_url\) does not answer .*Start it"):
        check_access(LlmConfig(base_url=url))


def test_a_local_server_needs_no_key_no_price_and_no_counting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with MessagesStub(local=True) as stub, Ledger(tmp_path / "requests.sqlite") as ledger:
        llm = config(stub, model="local-model", prices={}, max_usd=0.0)
        (answer,) = ask([question(1, model="local-model")], anything, llm, ledger)
        assert (answer.outcome, answer.usd) == ("answered", 0.0)
        with pytest.raises(BadInput, match=r"analysis\.llm\.model \(other-model\) is not served by .*local-model"):
            check_access(config(stub, model="other-model"))
    assert "$0.00" in capsys.readouterr().out


def test_the_command_says_so_before_other_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = AnalysisSettings()
    settings.analysis.annotate.annotator = "llm"
    weights, latents, scores = (tmp_path / name for name in ("weights", "latents.parquet", "scores.csv"))
    first = Step("latents", {}, {"weights": weights}, (latents.name,), lambda: latents.write_text(weights.read_text()))
    last = Step("score", {"judge": MODEL}, {latents.name: latents}, (scores.name,), lambda: scores.write_text(""))
    monkeypatch.delenv("ANTHROPIC_API_KEY")

    def refused(*steps: Step) -> None:
        with pytest.raises(BadInput, match="No key"):
            _check_access(settings, {tmp_path: list(steps)})

    refused(first, last)
    weights.write_text("trained")
    run_steps([first, last], tmp_path)
    assert not _check_access(settings, {tmp_path: [first, last]})  # all is done
    refused(first, replace(last, settings={"judge": None}))
    refused(first, replace(last, is_lacking=lambda: True))
    refused(replace(first, settings={"threshold": 1}), last)  # what is made of it may lead to questions
    weights.write_text("trained again")
    refused(first, last)
    run_steps([first], tmp_path)
    refused(first, last)  # as where the estimate was refused after that
    run_steps([last], tmp_path)
    scores.unlink()
    refused(first, last)


def test_a_study_that_is_too_dear_is_refused_before_its_first_pair_is_paid(tmp_path: Path) -> None:
    with MessagesStub() as stub:
        settings, folders = make_study(tmp_path)
        settings.analysis.annotate.annotator = "llm"
        settings.analysis.llm = config(stub, repeats=2)
        settings.analysis.llm.max_usd = 0.35  # enough for one of the two pairs
        check_expenses(settings, folders[:1])
        with pytest.raises(BadInput, match=r"language models: .* in all, more than .*max_usd \(\$0\.35.*Nothing was"):
            check_expenses(settings, folders)
        settings.analysis.llm.mode = "batch"  # half the price
        check_expenses(settings, folders)
        assert not stub.bodies


def test_batches_are_estimated_at_half_the_price(tmp_path: Path) -> None:
    with MessagesStub() as stub, Ledger(tmp_path / "requests.sqlite") as ledger:
        dear, cheap = (estimated([question(1)], config(stub, mode=mode), ledger) for mode in ("sync", "batch"))
    assert cheap.usd == pytest.approx(dear.usd / 2) and dear.usd > 0
    assert list(cheap.worst.values()) == pytest.approx([usd / 2 for usd in dear.worst.values()])


def test_a_key_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with MessagesStub() as stub:
        monkeypatch.setattr(stub, "local", False)
        monkeypatch.setattr("tests.analysis.messages_stub.Handler._models", refuse)
        with pytest.raises(BadInput, match=r"401 .*Check the key in ANTHROPIC_API_KEY"):
            check_access(config(stub))


def refuse(handler: Any, name: list[str]) -> None:
    handler._error(401, "invalid x-api-key")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("concurrency", 0, "analysis.llm.concurrency"),
        ("repeats", 0, "analysis.llm.repeats"),
        ("max_attempts_per_answer", 0, "analysis.llm.max_attempts_per_answer"),
        ("max_usd", -1.0, "analysis.llm.max_usd"),
        ("max_usd", math.nan, "analysis.llm.max_usd"),
        ("timeout_s", 0.0, "analysis.llm.timeout_s"),
        ("timeout_s", math.nan, "analysis.llm.timeout_s"),
        ("poll_s", math.inf, "analysis.llm.poll_s"),
        ("mode", "stream", "analysis.llm.mode"),
        ("effort", "huge", "analysis.llm.effort"),
        ("model", "", "analysis.llm.model"),
        ("second_model", MODEL, "analysis.llm.second_model"),
        ("prices", {"m": [1.0, 2.0]}, r"analysis.llm.prices: that of m \(\[1.0, 2.0\]\)"),
        ("prices", {"m": [1.0, 2.0, math.nan, 1.0]}, "analysis.llm.prices: that of m"),
        ("prices", {"m": [1.0, "2", 3.0, 1.0]}, "analysis.llm.prices: that of m"),
    ],
)
def test_settings_that_cannot_be_used(name: str, value: Any, message: str) -> None:
    analysis = AnalysisConfig()
    setattr(analysis.llm, name, value)
    with pytest.raises(BadInput, match=message):
        check_analysis(analysis)


@pytest.mark.parametrize(
    ("section", "name"), [("annotate", "annotator"), ("taxonomy", "placer"), ("taxonomy", "encoder")]
)
def test_annotators_are_named_right(section: str, name: str) -> None:
    analysis = AnalysisConfig()
    setattr(getattr(analysis, section), name, "gpt")
    with pytest.raises(BadInput, match=rf"analysis\.{section}\.{name} \(gpt\)"):
        check_analysis(analysis)
