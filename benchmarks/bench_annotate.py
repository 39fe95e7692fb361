"""How many latents are annotated per second against a server that takes 200 ms for an answer.

    python -m benchmarks.bench_annotate [latents]

A latent is two requests, its description and its category. The server is the tests' stub of the Messages API in a
process of its own, so that client and server share nothing but the machine. Ideal: concurrency / latency requests per
second, with every request under way at any moment and no work besides.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.annotate.annotations import read_annotations
from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.taxonomy.step import categorise
from benchmarks.timing import machine
from tests.analysis.made_study import FILLER_TEXT, write_examples

LATENCY_S = 0.2
CONCURRENCY = (1, 8, 32)
# Latents for each concurrency unless given: seconds at the rate of the ideal.
SECONDS, REPEATS = 12, 3


def main() -> None:
    print(machine())
    print(f"{'concurrency':>12}{'latents':>9}{'latents/s':>11}{'x one':>8}{'of ideal':>10}")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.analysis.messages_stub", "--port", "0", "--latency", str(LATENCY_S), "--local"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        rates = {concurrency: best_rate(url, concurrency) for concurrency in CONCURRENCY}
    finally:
        server.terminate()
    for concurrency, (latents, rate) in rates.items():
        ideal = concurrency / LATENCY_S / 2
        alone = rate / rates[1][1]
        print(f"{concurrency:>12}{latents:>9}{rate:>11.2f}{alone:>8.2f}{rate / ideal:>10.1%}")


def best_rate(url: str, concurrency: int) -> tuple[int, float]:
    """Number of latents, and the highest of several rates: others share the machine."""
    latents = int(sys.argv[1]) if len(sys.argv) > 1 else round(SECONDS * concurrency / LATENCY_S / 2)
    return latents, max(rate_of(url, concurrency, latents) for _ in range(REPEATS))


def rate_of(url: str, concurrency: int, latents: int) -> float:
    """Latents that are described and put into categories per second, from the examples on disk to the files."""
    with tempfile.TemporaryDirectory() as root:
        folder = make_folder(Path(root), latents)
        settings = AnalysisSettings(outputs=root)
        settings.analysis.annotate.annotator = "llm"
        llm = settings.analysis.llm
        llm.base_url, llm.model, llm.concurrency = url, "local-model", concurrency
        start = time.perf_counter()
        annotate(settings, folder)
        categorise(settings, folder)
        taken = time.perf_counter() - start
        assert {record.outcome for record in read_annotations(folder)} == {"described"}
    return latents / taken


def make_folder(root: Path, latents: int) -> Path:
    """What annotation reads: that many latents of one model, with eight documents each."""
    folder = root / "analysis" / "base_tuned"
    folder.mkdir(parents=True)
    table = {"latent": list(range(latents)), "owner": ["tuned"] * latents}
    pq.write_table(pa.table(table), folder / "latents.parquet")
    write_examples(folder / "examples.sqlite", {n: FILLER_TEXT[n % len(FILLER_TEXT)] for n in range(latents)})
    return folder


if __name__ == "__main__":
    main()
