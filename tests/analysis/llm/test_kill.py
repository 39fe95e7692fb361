"""kill -9 at any moment of the real steps, and once more: one outcome each, and nothing that came is paid twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.annotate.annotations import read_annotations
from analysis.llm.ledger import ledger_path
from analysis.scoring.scores import read_scores
from analysis.taxonomy.categories import read_categories
from extract.interrupts import EXIT_INTERRUPTED
from tests.analysis.asked import by_prompt, rows
from tests.analysis.made_study import add_samples, make_study
from tests.analysis.messages_stub import MessagesStub

CONCURRENCY, NUM_LATENTS = 4, 20


class Steps:
    """Runs of annotate, categorise and score, each in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._line() == "ready"

    def start(self, folder: Path, stub: MessagesStub, **llm: object) -> int:
        """The pid of a run that has begun."""
        asked = {"folder": str(folder), "llm": {"base_url": stub.url, "concurrency": CONCURRENCY} | llm}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def status(self) -> int:
        """The exit status of the run, once it has ended."""
        return os.waitstatus_to_exitcode(int(self._line()))

    def _line(self) -> str:
        """The next line of its own, not of the steps."""
        assert self._process.stdout
        while not (line := self._process.stdout.readline().strip()).isdigit() and line != "ready":
            assert self._process.poll() is None
        return line


@pytest.fixture(scope="module")
def steps() -> Iterator[Steps]:
    root = Path(__file__).parents[3]
    environment = os.environ | {"ANTHROPIC_API_KEY": "key", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.analysis.killed_steps"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=root) as process:
        try:
            yield Steps(process)
        finally:
            process.kill()


@pytest.mark.parametrize("mode", ["sync", "batch"])
def test_killed_at_any_moment_and_run_again(steps: Steps, tmp_path: Path, mode: str) -> None:
    _, (folder, _) = make_study(tmp_path, num_cards=NUM_LATENTS - 3)
    add_samples(folder / "examples.sqlite")
    rng, kills = random.Random(mode), 0
    llm = {"mode": mode, "repeats": 2, "poll_s": 0.05}
    with MessagesStub(answer=by_prompt, latency=0.04, batch_s=0.25) as stub:
        for _ in range(9):
            pid = steps.start(folder, stub, **llm)
            time.sleep(rng.uniform(0.1, 0.7))
            os.kill(pid, signal.SIGKILL)
            kills += steps.status() == -signal.SIGKILL
        steps.start(folder, stub, **llm)
        assert steps.status() == 0 and kills > 2
        paid = stub.paid.copy()
        steps.start(folder, stub, **llm)
        assert steps.status() == 0 and stub.paid == paid
    annotated, placed = read_annotations(folder, votes=True), read_categories(folder, votes=True)
    assert Counter((row.latent, row.vote) for row in annotated) == Counter((row.latent, row.vote) for row in placed)
    assert len(annotated) == NUM_LATENTS * 2 == len({(row.latent, row.vote) for row in annotated})
    assert {row.outcome for row in annotated} == {"described"} and {row.outcome for row in placed} == {"placed"}
    scores = read_scores(folder)
    assert len(scores) == NUM_LATENTS * 4 and {row.outcome for row in scores} == {"scored"}
    check_payments(tmp_path, stub, kills, mode)


def check_payments(root: Path, stub: MessagesStub, kills: int, mode: str) -> None:
    """Each question has one stored response. Only requests under way at a kill were paid for and lost."""
    ledger = ledger_path(root)
    num_questions = (2 * 2 + 2 * 2) * NUM_LATENTS  # two votes, described and placed; two tests, each with its control
    stored = rows(ledger, "SELECT count(*) FROM attempts WHERE status = 'response' GROUP BY question")
    assert stored == [(1,)] * num_questions
    ((lost,),) = rows(ledger, "SELECT count(*) FROM attempts WHERE status = 'sent'")
    assert lost <= (CONCURRENCY * kills if mode == "sync" else 0)
    # The repeats of a question are one content.
    assert num_questions <= sum(stub.paid.values()) <= num_questions + lost
    assert mode == "sync" or Counter(stub.paid.values()) == {2: 2 * NUM_LATENTS, 1: 4 * NUM_LATENTS}


def test_sigterm_ends_the_step_with_what_came(steps: Steps, tmp_path: Path) -> None:
    _, (folder, _) = make_study(tmp_path, num_cards=NUM_LATENTS - 3)
    add_samples(folder / "examples.sqlite")
    with MessagesStub(answer=by_prompt, latency=0.1) as stub:
        pid = steps.start(folder, stub)
        while len(stub.bodies) < 6:
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        assert steps.status() == EXIT_INTERRUPTED and not (folder / "annotations.jsonl").exists()
        paid = stub.paid.total()
        assert rows(ledger_path(tmp_path), "SELECT count(*) FROM questions WHERE outcome = 'answered'") == [(paid,)]
        steps.start(folder, stub, concurrency=16)
        assert steps.status() == 0
    assert set(stub.paid.values()) == {1} and len(stub.paid) == 6 * NUM_LATENTS
