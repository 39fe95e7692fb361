"""How large the report of 5,000 latents is and what it costs beside one of 500; how fast the dashboard answers.

    python -m benchmarks.bench_report

The study is the tests' made one: each of the owned latents has 4 documents of some 60 tokens, a description and a
category. The dashboard has as many latents as the crosscoders of arXiv 2509.18792, 5,000 of them owned, and is asked
over HTTP's WSGI interface: an answer is what the browser would get, without the browser.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.dashboard.app import Study, make_app
from analysis.dashboard.filters import ORDERS
from analysis.report.step import report
from analysis.taxonomy.step import categorise, load_taxonomy
from benchmarks.timing import machine
from tests.analysis.made_study import FILLER_TEXT, make_study, write_examples

CARDS = (500, 5_000)
NUM_LATENTS = 114_688
NUM_DOCUMENTS = 4
LOCAL = {"Host": "localhost"}


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as root:
        studies = {num: make(Path(root) / str(num), num, NUM_LATENTS) for num in CARDS}
        seconds = {num: time_report(settings, num) for num, settings in studies.items()}
        print(f"{CARDS[1]} against {CARDS[0]} cards: {seconds[CARDS[1]] / seconds[CARDS[0]]:.2f} times the CPU seconds")
        time_dashboard(Path(root) / str(CARDS[1]))


def make(root: Path, num_own: int, num_latents: int) -> AnalysisSettings:
    """A study of one pair: `num_own` latents of the tuned model, described and in categories, and others."""
    settings, (folder, _) = make_study(root)
    settings.pairs = {folder.name: settings.pairs[folder.name]}
    settings.analysis.taxonomy.encoder = "tfidf"
    table = pq.read_table(folder / "latents.parquet")
    owned = np.array(table["owner"].to_pylist()) == "simpo"
    rows = [np.flatnonzero(owned), np.flatnonzero(~owned)]
    taken = np.concatenate([np.resize(rows[0], num_own), np.resize(rows[1], num_latents - num_own)])
    numbers = {name: pa.array(np.arange(num_latents), table[name].type) for name in ("latent", "group")}
    table = table.take(taken)
    for name, values in numbers.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, folder / "latents.parquet")
    (folder / "examples.sqlite").unlink()
    texts = {latent: FILLER_TEXT[latent % len(FILLER_TEXT)] for latent in range(num_own)}
    write_examples(folder / "examples.sqlite", texts, NUM_DOCUMENTS)
    annotate(settings, folder)
    categorise(settings, folder)
    return settings


def time_report(settings: AnalysisSettings, num_cards: int) -> float:
    """CPU seconds of the report, once what is imported late is there."""
    folders = [Path(settings.outputs) / "analysis" / pair for pair in settings.pairs]
    if num_cards == CARDS[0]:
        report(settings, folders)
    start = time.process_time()
    page = report(settings, folders)
    taken = time.process_time() - start
    print(f"report of {num_cards} cards: {page.stat().st_size / 1e6:.1f} MB, {taken:.1f} CPU seconds")
    return taken


def time_dashboard(outputs: Path) -> None:
    """Prints the wall seconds of each answer; the first reads the files."""
    asked = asking(outputs)
    values = {"pair": "base_simpo", "url": "/", "page": 0, "order": next(iter(ORDERS))}
    latent = f"/latent/base_simpo/{CARDS[1] - 1}"
    for name, answer in {
        "first page": lambda: asked("table.children", "url", **values),
        "next page": lambda: asked("table.children", "next", **values),
        "search": lambda: asked("table.children", "search", **values, search="dragon castle"),
        "a latent": lambda: (
            asked("facts.children", "url", url=latent),
            asked("documents.children", "url", url=latent, kind="top", context=64),
        ),
    }.items():
        start = time.perf_counter()
        answer()
        print(f"dashboard of {NUM_LATENTS} latents, {name}: {time.perf_counter() - start:.2f} s")


def asking(outputs: Path) -> Callable[..., Any]:
    """What asks the dashboard for one output as its page would, for values by the ids of inputs and states."""
    client = make_app(Study("made", outputs, load_taxonomy())).server.test_client()
    known = client.get("/_dash-dependencies", headers=LOCAL).get_json()

    def ask(output: str, changed: str, **values: object) -> Any:
        (found,) = [entry for entry in known if output in entry["output"].strip(".").split("...")]
        names = [name.rsplit(".", 1) for name in found["output"].strip(".").split("...")]
        outputs = [{"id": name, "property": part} for name, part in names]
        inputs, state = (
            [{**one, "value": values.get(one["id"])} for one in found[kind]] for kind in ("inputs", "state")
        )
        changes = [f"{one['id']}.{one['property']}" for one in inputs if one["id"] == changed]
        several = found["output"].startswith("..")
        body = {"output": found["output"], "outputs": outputs if several else outputs[0], "inputs": inputs}
        posted = client.post(
            "/_dash-update-component", json={**body, "state": state, "changedPropIds": changes}, headers=LOCAL
        )
        assert posted.status_code == 200, posted.status
        return posted.get_json()

    return ask


if __name__ == "__main__":
    main()
