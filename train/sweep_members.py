"""python -m train.sweep_members RECORD...: members of a sweep that train together on this machine, with one reader.

Each RECORD is what a sweep wrote down of one, `<outputs>/sweeps/<run name>.json`. `slurm/sweep_members.sh` runs it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from extract.command import EXIT_BAD_INPUT
    from extract.errors import BadInput
    from train.sweep import Member, is_finished
    from train.sweep_local import run_together


def main(records: list[Path]) -> int:
    """The status of all of them; members that are finished are left out."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        members = [Member.read(record) for record in records]
        missing = [member for member in members if not is_finished(member.settings, member.folder)]
        return run_together(missing) if missing else 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    with one_line_interrupts():
        sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
