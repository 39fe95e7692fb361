"""The ledger of a study, `requests.sqlite`: every question, every attempt with its raw response, every outcome.

    texts(sha256, text)                         system prompts and schemas, which many questions share
    questions(id, kind, subject, repeat, model, system, schema, prompt, max_tokens, effort,
              outcome, value, reason)           outcome and what follows are null until there is one
    attempts(number, question, batch, started, ended, status, error, response, message,
             input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, usd, usd_unknown, max_tokens)
    batches(number, id, created, ended)         id is null between the intent to create a batch and its creation

`status` of an attempt: sent (no response yet: under way, or lost with the process that sent it), response, error.
`usd_unknown` is the most that it may have cost while nobody knows whether it was answered, as after a timeout or a
kill: it counts as spent. `max_tokens` of a question is that of the first time it was put, of an attempt its own.
An attempt is written before its request is sent, and its response before the next request, in synchronous transactions;
so a killed process loses at most the responses that were on their way. One process at a time may ask.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.llm.questions import OUTCOMES, Answer, Question
from extract.errors import BadInput

USAGE = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens")
COSTS = ("kind", "model", "requests", *OUTCOMES, *USAGE, "usd", "usd_unknown")
# Seconds between attempts to open what another process has.
WAIT_S = 1.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS texts(sha256 TEXT PRIMARY KEY, text TEXT);
CREATE TABLE IF NOT EXISTS questions(id TEXT PRIMARY KEY, kind TEXT, subject TEXT, repeat INTEGER, model TEXT,
    system TEXT, schema TEXT, prompt TEXT, max_tokens INTEGER, effort TEXT, outcome TEXT, value TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS attempts(number INTEGER PRIMARY KEY, question TEXT, batch INTEGER, started REAL, ended REAL,
    status TEXT, error TEXT, response TEXT, message TEXT, input_tokens INTEGER DEFAULT 0,
    cache_read_tokens INTEGER DEFAULT 0, cache_write_tokens INTEGER DEFAULT 0, output_tokens INTEGER DEFAULT 0,
    usd REAL DEFAULT 0, usd_unknown REAL DEFAULT 0, max_tokens INTEGER DEFAULT 0);
CREATE INDEX IF NOT EXISTS attempts_question ON attempts(question);
CREATE INDEX IF NOT EXISTS attempts_batch ON attempts(batch);
CREATE TABLE IF NOT EXISTS batches(number INTEGER PRIMARY KEY, id TEXT, created REAL, ended REAL);
"""


def ledger_path(outputs: str | Path) -> Path:
    """The ledger of a study's outputs."""
    return Path(outputs) / "analysis" / "requests.sqlite"


@dataclass(frozen=True)
class Response:
    """A response as it came, with what it used and cost. `message` is the id that the server gave it."""

    text: str
    message: str
    usage: dict[str, int]
    usd: float
    # Tokens that it was allowed to have; what is not in the ledger yet does not say.
    max_tokens: int = 0


@dataclass(frozen=True)
class OpenBatch:
    """A batch to be waited for: its number here, the server's id if it is known, and its attempts by question id."""

    number: int
    name: str | None
    created: float
    attempts: dict[str, int]


class Ledger:
    """`with Ledger(path) as ledger:` opens it for this process alone, and waits while another has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection
        self._grouping = False

    def __enter__(self) -> Ledger:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_open = self._open()
        if not is_open:
            print(
                f"{self.path} is in use by another process that asks language models for this study: waiting for it, "
                "since two would pay for the same answers",
                flush=True,
            )
        while not is_open:
            time.sleep(WAIT_S)
            is_open = self._open()
        return self

    def _open(self) -> bool:
        """Opens the database, unless another process has it."""
        self._database = sqlite3.connect(self.path, isolation_level=None, timeout=0)
        try:
            # Exclusive locking first: the write-ahead log then needs no shared memory, which network disks lack.
            self._database.executescript("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL")
            self._database.executescript(f"PRAGMA synchronous = FULL; BEGIN IMMEDIATE; {SCHEMA} COMMIT")
            self._add_columns()
        except sqlite3.OperationalError as error:
            self._database.close()
            if "locked" not in str(error):
                raise
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._database.execute("PRAGMA journal_mode = DELETE")  # one file again, for those who copy or read it
        self._database.close()

    def _add_columns(self) -> None:
        """Those that ledgers of earlier versions lack."""
        there = {row[1] for row in self._database.execute("PRAGMA table_info(attempts)")}
        for name, kind in (("usd_unknown", "REAL"), ("max_tokens", "INTEGER")):
            if name not in there:
                self._database.execute(f"ALTER TABLE attempts ADD COLUMN {name} {kind} DEFAULT 0")

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Within this block writes wait for `commit`, so that one synchronous write serves many; its end commits."""
        self._grouping = True
        try:
            yield
        finally:
            self._grouping = False
            self.commit()

    def commit(self) -> None:
        """Makes durable what was written. BadInput if the disk does not take it."""
        if self._database.in_transaction:
            try:
                self._database.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise BadInput(
                    f"{self.path}: {error}. Make room; the same command asks for what is missing."
                ) from error

    def _write(self, statement: str, values: tuple[Any, ...]) -> int:
        """One change, durable on return unless changes are grouped; the number of the row that it inserted. Halves of
        characters, of which models and servers may write some, are escaped: no SQLite text can hold them.
        """
        held = [v.encode("utf-8", errors="backslashreplace").decode() if isinstance(v, str) else v for v in values]
        if not self._database.in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
        row = self._database.execute(statement, held).lastrowid
        if not self._grouping:
            self.commit()
        return int(row or 0)

    def add(self, questions: Iterable[Question]) -> None:
        """Enters the questions that are new."""
        with self.grouped():
            for row in map(_row, questions):
                texts = {text: hashlib.sha256(text.encode()).hexdigest() for text in row[5:7]}
                for text, digest in texts.items():
                    self._write("INSERT OR IGNORE INTO texts VALUES (?, ?)", (digest, text))
                values = (*row[:5], *(texts[text] for text in row[5:7]), *row[7:], None, None, None)
                self._write(f"INSERT OR IGNORE INTO questions VALUES ({', '.join('?' * 13)})", values)

    def outcome(self, question: Question) -> tuple[str, dict[str, Any] | None, str] | None:
        """(outcome, value, reason) of a question that has them."""
        row = self._database.execute(
            "SELECT outcome, value, reason FROM questions WHERE id = ? AND outcome IS NOT NULL", (question.id,)
        ).fetchone()
        return row and (row[0], json.loads(row[1]), row[2])

    def conclude(self, question: Question, outcome: str, value: dict[str, Any] | None, reason: str) -> None:
        """Enters what became of a question."""
        self._write(
            "UPDATE questions SET outcome = ?, value = ?, reason = ? WHERE id = ?",
            (outcome, json.dumps(value), reason, question.id),
        )

    def begin(self, question: Question, batch: int | None = None, worst: float = 0.0) -> int:
        """Enters an attempt that is about to be sent and may cost `worst`, and returns its number."""
        names = "question, batch, started, status, usd_unknown, max_tokens"
        values = (question.id, batch, time.time(), worst, question.max_tokens)
        return self._write(f"INSERT INTO attempts({names}) VALUES (?, ?, ?, 'sent', ?, ?)", values)

    def complete(self, attempt: int, response: Response) -> None:
        """Enters the response of an attempt."""
        values = (response.text, response.message, *(response.usage[name] for name in USAGE), response.usd)
        self._write(
            "UPDATE attempts SET status = 'response', ended = ?, response = ?, message = ?, "
            f"{', '.join(f'{name} = ?' for name in USAGE)}, usd = ?, usd_unknown = 0 WHERE number = ?",
            (time.time(), *values, attempt),
        )

    def fail(self, attempt: int, error: str, charged: bool = False) -> None:
        """Enters why an attempt has no response, and whether it may have cost something all the same."""
        self._write(
            "UPDATE attempts SET status = 'error', ended = ?, error = ?, usd_unknown = usd_unknown * ? "
            "WHERE number = ?",
            (time.time(), error, int(charged), attempt),
        )

    def responses(self, question: Question) -> list[Response]:
        """What came to a question, oldest first."""
        rows = self._database.execute(
            f"SELECT response, message, {', '.join(USAGE)}, usd, max_tokens FROM attempts "
            "WHERE question = ? AND status = 'response' ORDER BY number",
            (question.id,),
        )
        return [Response(row[0], row[1], dict(zip(USAGE, row[2:6], strict=True)), *row[6:]) for row in rows]

    def spent(self) -> float:
        """Dollars of all responses of the study, and the most that attempts of unknown fate may have cost."""
        return float(self._database.execute("SELECT total(usd) + total(usd_unknown) FROM attempts").fetchone()[0])

    def unknown(self) -> float:
        """Dollars that attempts of unknown fate may have cost at most."""
        return float(self._database.execute("SELECT total(usd_unknown) FROM attempts").fetchone()[0])

    def has_response(self, kind: str, model: str) -> bool:
        """Whether a model has ever responded to questions of a kind."""
        found = "SELECT 1 FROM attempts JOIN questions ON question = id WHERE kind = ? AND model = ? AND status = ?"
        return self._database.execute(f"{found} LIMIT 1", (kind, model, "response")).fetchone() is not None

    def has_failed(self, reason: str) -> bool:
        """Whether a question has failed for exactly that reason."""
        found = "SELECT 1 FROM questions WHERE outcome = 'failed' AND reason = ? LIMIT 1"
        return self._database.execute(found, (reason,)).fetchone() is not None

    def mean_output(self, kind: str, model: str) -> float | None:
        """Mean output tokens of the responses of a kind and model, if there are ten."""
        count, mean = self._database.execute(
            "SELECT count(*), avg(output_tokens) FROM attempts JOIN questions ON question = id "
            "WHERE kind = ? AND model = ? AND status = 'response'",
            (kind, model),
        ).fetchone()
        return float(mean) if count >= 10 else None

    def answer(self, question: Question) -> Answer:
        """The outcome of a question that has one, with what all its attempts used."""
        found = self.outcome(question)
        assert found is not None
        responses = self.responses(question)
        usage = {name: sum(response.usage[name] for response in responses) for name in USAGE}
        return Answer(question.id, *found, question.model, usage, sum(response.usd for response in responses))

    def intend_batch(self, questions: list[Question], worst: dict[str, float]) -> OpenBatch:
        """Enters that a batch of these questions is about to be created. `worst` is the most that each may cost."""
        with self.grouped():
            now = time.time()
            number = self._write("INSERT INTO batches(created) VALUES (?)", (now,))
            attempts = {question.id: self.begin(question, number, worst[question.id]) for question in questions}
        return OpenBatch(number, None, now, attempts)

    def name_batch(self, number: int, name: str) -> None:
        """Enters the id that the server gave a batch."""
        self._write("UPDATE batches SET id = ? WHERE number = ?", (name, number))

    def end_batch(self, number: int, error: str = "the batch has no result for it") -> None:
        """Enters that all there is of a batch has been read; what has no response by now gets none."""
        with self.grouped():
            now = time.time()
            self._write("UPDATE batches SET ended = ? WHERE number = ?", (now, number))
            self._write(
                "UPDATE attempts SET status = 'error', ended = ?, error = ?, usd_unknown = 0 "
                "WHERE batch = ? AND status = 'sent'",
                (now, error, number),
            )

    def open_batches(self) -> list[OpenBatch]:
        """Batches that were intended or created and whose results have not been read."""
        found = self._database.execute("SELECT number, id, created FROM batches WHERE ended IS NULL ORDER BY number")
        sent = "SELECT question, number FROM attempts WHERE batch = ? AND status = 'sent'"
        return [
            OpenBatch(number, name, created, dict(self._database.execute(sent, (number,)).fetchall()))
            for number, name, created in found.fetchall()
        ]

    def model_of(self, question: str) -> str:
        """The model that a question (by its id) was put to."""
        row = self._database.execute("SELECT model FROM questions WHERE id = ?", (question,)).fetchone()
        return str(row[0])

    def known_batches(self) -> set[str]:
        """Ids of all batches that were created for this study."""
        return {name for (name,) in self._database.execute("SELECT id FROM batches WHERE id IS NOT NULL")}

    def costs(self) -> list[tuple[Any, ...]]:
        """Rows of `COSTS`: what was asked of each model by kind, what became of it, and what it took."""
        outcomes = ", ".join(f"sum(outcome IS '{outcome}')" for outcome in OUTCOMES)
        sums = ", ".join(f"sum({name}) AS {name}" for name in (*USAGE, "usd", "usd_unknown"))
        taken = ", ".join(f"coalesce({name}, 0)" for name in (*USAGE, "usd", "usd_unknown"))
        return self._database.execute(
            f"SELECT kind, model, coalesce(requests, 0), {outcomes}, {taken} FROM questions LEFT JOIN (SELECT kind, "
            f"model, count(*) AS requests, {sums} FROM attempts JOIN questions ON question = id GROUP BY kind, model) "
            "USING (kind, model) GROUP BY kind, model ORDER BY kind, model"
        ).fetchall()


def _row(question: Question) -> tuple[Any, ...]:
    schema = json.dumps(question.schema, sort_keys=True)
    asked = (question.kind, question.subject, question.repeat, question.model, question.system, schema)
    return (question.id, *asked, question.prompt, question.max_tokens, question.effort)
