"""`costs.csv`: what the requests of a study came to, by kind and model."""

from __future__ import annotations

import csv
import io

from analysis.llm.ledger import USAGE, Ledger
from analysis.llm.questions import OUTCOMES
from extract.publish import publish

COSTS = "costs.csv"
COLUMNS = ("kind", "model", "requests", *OUTCOMES, *USAGE, "usd")


def write_costs(ledger: Ledger) -> None:
    """Publishes `costs.csv` beside the ledger. `requests` counts all attempts, also those without a response."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "usd": f"{row['usd']:.6f}"} for row in ledger.costs())
    publish(ledger.path.with_name(COSTS), text.getvalue().encode())
