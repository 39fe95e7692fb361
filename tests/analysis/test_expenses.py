"""What all pairs will cost is said before the first is asked: of what is new, whatever was asked before."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from analysis.annotate.step import annotate, owned_of
from analysis.config import AnalysisSettings
from analysis.expenses import check_expenses, descriptions_of, left_of
from analysis.llm.ledger import Ledger, ledger_path
from analysis.llm.messages import request_of
from analysis.scoring.step import score
from analysis.taxonomy.step import DEFAULT, categorise
from extract.errors import BadInput
from tests.analysis.asked import MODEL, by_prompt, config, estimated
from tests.analysis.made_study import add_samples, make_study
from tests.analysis.messages_stub import MessagesStub

pytestmark = pytest.mark.usefixtures("key")
SECOND = "claude-haiku-5-5"
# Latents of simpo and of dpo.
MINE, OTHERS = 3, 2


def made(root: Path, stub: MessagesStub) -> tuple[AnalysisSettings, list[Path]]:
    """Two pairs whose latents have documents that the annotator is not shown."""
    settings, folders = make_study(root)
    for folder in folders:
        add_samples(folder / "examples.sqlite")
    settings.analysis.annotate.annotator, settings.analysis.annotate.num_documents = "llm", 4
    settings.analysis.scoring.resamples = settings.analysis.agreement.resamples = 10
    settings.analysis.llm = config(stub)
    return settings, folders


def ask_all(settings: AnalysisSettings, folder: Path) -> None:
    for step in (annotate, categorise, score):
        step(settings, folder)


def enough(settings: AnalysisSettings, folder: Path) -> float:
    """About the least `max_usd` that is not refused."""
    settings.analysis.llm.max_usd = 0.0
    with pytest.raises(BadInput) as refused:
        check_expenses(settings, [folder])
    return float(re.findall(r"Raise it to about \$(\S+),", str(refused.value))[0]) / 1.1  # a tenth to spare


def left(settings: AnalysisSettings, folder: Path) -> dict[str, int]:
    """What is left to ask of the first model, by kind."""
    with Ledger(ledger_path(settings.outputs)) as ledger:
        found = left_of(settings, folder, ledger)
    assert {model for _, model in found} <= {MODEL}
    return {kind: count for (kind, _), count in found.items() if count}


def test_what_is_left_is_what_the_steps_then_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesStub(answer=by_prompt) as stub:
        settings, (first, second) = made(tmp_path, stub)
        judged = {"detect": 2 * MINE, "fuzz": 2 * MINE}
        assert left(settings, first) == {"describe": MINE, "categorise": MINE} | judged
        annotate(settings, first)
        assert left(settings, first) == {"categorise": MINE} | judged
        categorise(settings, first)
        assert left(settings, first) == judged
        score(settings, first)
        assert left(settings, first) == {} and len(stub.bodies) == 6 * MINE
        capsys.readouterr()
        check_expenses(settings, [first])
        assert capsys.readouterr().out == ""
        # What was answered about one pair says nothing of another.
        check_expenses(settings, [first, second])
    assert f"about {6 * OTHERS} questions on {MINE + OTHERS} latents" in capsys.readouterr().out


def test_what_changes_the_questions_is_asked_anew(tmp_path: Path) -> None:
    with MessagesStub(answer=by_prompt) as stub:
        settings, (folder, _) = made(tmp_path, stub)
        ask_all(settings, folder)
        taxonomy = tmp_path / "taxonomy.yaml"
        taxonomy.write_text(DEFAULT.read_text() + "\nMore:\n  One more: of another kind\n")
        settings.analysis.taxonomy.path = str(taxonomy)
        assert left(settings, folder) == {"categorise": MINE}
        settings.analysis.taxonomy.path = None
        settings.analysis.scoring.seed = 1
        assert set(left(settings, folder)) == {"detect", "fuzz"}
        settings.analysis.scoring.seed = 0
        settings.analysis.annotate.num_documents = 3
        assert left(settings, folder) == {"describe": MINE, "categorise": MINE, "detect": 2 * MINE, "fuzz": 2 * MINE}


def test_latents_that_other_thresholds_add_are_paid_for(tmp_path: Path) -> None:
    with MessagesStub(answer=by_prompt) as stub:
        settings, (folder, _) = made(tmp_path, stub)
        path = folder / "latents.parquet"
        table = pq.read_table(path)
        fewer = pc.if_else(pc.equal(table["latent"], 302), "other", table["owner"])
        pq.write_table(table.set_column(table.schema.get_field_index("owner"), "owner", fewer), path)
        assert len(owned_of(folder)) == MINE - 1
        ask_all(settings, folder)
        pq.write_table(table, path)
        assert left(settings, folder) == {"describe": 1, "categorise": 1, "detect": 2, "fuzz": 2}


def test_what_failed_is_still_to_be_paid_and_what_was_refused_is_not(tmp_path: Path) -> None:
    number = iter(["answer", "refusal", *["status 500"] * 3])
    with MessagesStub(lambda prompt, nth: next(number, "answer"), answer=by_prompt) as stub:
        settings, (folder, _) = made(tmp_path, stub)
        settings.analysis.llm.concurrency = 1
        annotate(settings, folder)
        # One is described, and has no other description to be judged by; one is refused; one is to come.
        assert left(settings, folder) == {"describe": 1, "categorise": 2, "detect": 3, "fuzz": 3}


def test_a_second_model_describes_and_places_but_does_not_judge(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        value = by_prompt(body)
        return value | {"label": body["model"]} if "label" in value else value

    with MessagesStub(answer=answer) as stub:
        settings, (folder, _) = made(tmp_path, stub)
        settings.analysis.llm.second_model, settings.analysis.llm.repeats = SECOND, 2
        with Ledger(ledger_path(settings.outputs)) as ledger:
            found = left_of(settings, folder, ledger)
        twice = {(kind, model): 2 * MINE for kind in ("describe", "categorise") for model in (MODEL, SECOND)}
        assert found == Counter(twice | {(kind, MODEL): 2 * MINE for kind in ("detect", "fuzz")})
        ask_all(settings, folder)
        assert left(settings, folder) == {}  # the judge is asked about primary votes alone


def test_offline_descriptions_are_judged_and_cost_nothing_else(tmp_path: Path) -> None:
    with MessagesStub(answer=by_prompt) as stub:
        settings, (folder, _) = made(tmp_path, stub)
        settings.analysis.annotate.annotator, settings.analysis.scoring.judge = "offline", MODEL
        annotate(settings, folder)
        assert left(settings, folder) == {"detect": 2 * MINE, "fuzz": 2 * MINE}


def test_what_is_spent_counts(tmp_path: Path) -> None:
    with MessagesStub(answer=by_prompt) as stub:
        settings, (first, second) = made(tmp_path, stub)
        ask_all(settings, first)
        with Ledger(ledger_path(settings.outputs)) as ledger:
            spent = ledger.spent()
        needed = enough(settings, second)
        settings.analysis.llm.max_usd = needed - spent / 2  # enough, were nothing spent
        with pytest.raises(BadInput, match=rf"language models: about {6 * OTHERS} questions .* Nothing was asked"):
            check_expenses(settings, [second])
        settings.analysis.llm.max_usd = needed
        check_expenses(settings, [second])


@pytest.mark.parametrize("created", [True, False])
def test_a_rerun_while_a_batch_is_open_needs_no_more_than_the_first_run(tmp_path: Path, created: bool) -> None:
    with MessagesStub(answer=by_prompt) as stub:
        settings, (folder, _) = made(tmp_path, stub)
        llm = settings.analysis.llm
        llm.mode = "batch"
        needed = enough(settings, folder)
        with Ledger(ledger_path(settings.outputs)) as ledger:  # killed while its batch is waited for, or created
            _, asked = descriptions_of(settings, folder, ledger)
            ledger.add(asked)
            batch = ledger.intend_batch(asked, estimated(asked, llm, ledger).worst)
            if created:
                requests = [{"custom_id": each.id, "params": request_of(each, llm)} for each in asked]
                ledger.name_batch(batch.number, stub.start_batch(requests)["id"])
            assert ledger.spent() > needed / 2  # so much may the batch cost at worst, a sixth of the questions
        llm.max_usd = needed / 2
        with pytest.raises(BadInput, match="Nothing was asked"):
            check_expenses(settings, [folder])
        llm.max_usd = needed
        check_expenses(settings, [folder])
        annotate(settings, folder)
        check_expenses(settings, [folder])
        assert set(stub.paid.values()) == {1} and len(stub.paid) == MINE == len(asked)
