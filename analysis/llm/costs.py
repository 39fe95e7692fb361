"""`costs.csv`: what the requests of a study came to, by kind and model."""

from __future__ import annotations

import csv
import io

from analysis.llm.ledger import USAGE, Ledger
from analysis.llm.questions import OUTCOMES
from extract.publish import publish

COSTS = "costs.csv"
COLUMNS = ("kind", "model", "requests", *OUTCOMES, *USAGE, "usd", "usd_unknown")


def write_costs(ledger: Ledger) -> None:
    """Publishes `costs.csv` beside the ledger. `requests` counts all attempts, also those without a response;
    `usd_unknown` is the most that those of unknown fate may have cost.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{name: f"{row[name]:.6f}" for name in ("usd", "usd_unknown")}} for row in ledger.costs())
    publish(ledger.path.with_name(COSTS), text.getvalue().encode())
