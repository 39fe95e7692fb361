"""Runs annotate, categorise and score for every line on standard input, in a child: prints its pid, then its status.

A line is a JSON object of the analysis folder and settings of `analysis.llm`: {"folder": ..., "llm": {...}}. The
children are forks of a process that has imported everything, so that they can be killed at any moment of the work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from analysis.annotate.step import annotate
from analysis.config import AnalysisSettings
from analysis.scoring.step import score
from analysis.taxonomy.step import categorise
from extract.errors import BadInput
from extract.interrupts import EXIT_INTERRUPTED, stops_interrupt


def work(folder: Path, overrides: dict[str, Any]) -> int:
    settings = AnalysisSettings(outputs=str(folder.parent.parent))
    settings.analysis.annotate.annotator, settings.analysis.annotate.num_documents = "llm", 4
    settings.analysis.scoring.resamples = settings.analysis.agreement.resamples = 10
    llm = settings.analysis.llm
    for name, value in overrides.items():
        setattr(llm, name, value)
    llm.prices = {llm.model: [2.0, 10.0, 2.5, 0.1]}
    try:
        with stops_interrupt():
            annotate(settings, folder)
            categorise(settings, folder)
            score(settings, folder)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = work(Path(asked["folder"]), asked["llm"])
            except KeyboardInterrupt:
                status = EXIT_INTERRUPTED
            os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
