"""A program of a few lines in place of Python, where what counts is how a process of a script ends."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Answers the look at the environment, and names the pairs of PAIRS; training is what ACT says.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "- "*) cat > /dev/null; echo "gpus 0"; exit ;;
  *train.preflight*) echo "preflight: $*" >&2; printf '%b' "${PAIRS:-}"; exit "${PREFLIGHT:-0}" ;;
esac
rank=${RANK:-alone}
echo "rank $rank of ${WORLD_SIZE:-1}, local ${LOCAL_RANK:-none}, at ${MASTER_ADDR:-none}: $*"
eval "$ACT"
"""


def stand_in(folder: Path) -> dict[str, str]:
    """The environment in which scripts start it; ACT is what it does as a rank."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    foreign = re.compile("SLURM|SBATCH|RANK|WORLD_SIZE|MASTER_|EXPERIMENT|GPU|STAGING|AGAIN|OMP")
    own = {name: value for name, value in os.environ.items() if not foreign.search(name)}
    return {**own, "PYTHON": str(python), "CROSSDIFF_SITE": "/dev/null", "ACT": "exit 0"}


def script(name: str, environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """What `bash slurm/NAME.sh` says, standard error included, and its status."""
    command = ["bash", str(ROOT / "slurm" / f"{name}.sh"), *arguments]
    return subprocess.run(
        command, env={**environment, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
