"""`costs.csv`: what the requests of a study came to, by kind and model."""

from __future__ import annotations

from analysis.csv_files import csv_bytes
from analysis.llm.ledger import COSTS, Ledger
from extract.publish import publish

FILE = "costs.csv"


def write_costs(ledger: Ledger) -> None:
    """Publishes `costs.csv` beside the ledger. `requests` counts all attempts, also those without a response;
    `usd_unknown` is the most that those of unknown fate may have cost. Where nothing came of a kind of questions, as
    without a key, it has no row.
    """
    asked = (row for row in ledger.costs() if any(row[2:]))
    rows = ([*counts, f"{usd:.6f}", f"{unknown:.6f}"] for *counts, usd, unknown in asked)
    publish(ledger.path.with_name(FILE), csv_bytes([COSTS, *rows]))
