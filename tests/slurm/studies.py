"""What a user has on a cluster: a checkout with an experiment and a site file of their own, and a study that is small.

The study has the demo's three models, of which the first six blocks are run, and 48 documents; every job of it takes
seconds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.base_model import prepare_base_model
from tests.slurm.cluster import LOOK_S, ROOT, Cluster

PARTS = ("analysis", "configs", "extract", "hydra_plugins", "slurm", "train")
ADAPTERS = ROOT / "demo" / "adapters"
EXPERIMENT = """\
# @package _global_
study: small
hookpoint: block5
models:
  base: {{id: "{model}", d_model: 576}}
  tuned: {{id: "{model}", adapter: "{adapters}/simpo", d_model: 576}}
  third: {{id: "{model}", adapter: "{adapters}/dpo", d_model: 576}}
pairs:
  base_tuned: [base, tuned]
  base_third: [base, third]
corpus: {{sources: [{{path: "{corpus}"}}], tokens_per_shard: 150}}
activations: {{batch_tokens: 256}}
crosscoder: {{num_latents: 64, k: 4, threshold_start_step: 5, dead_after_tokens: 640}}
data: {{num_lanes: 4, shuffle_window: 40, heldout_fraction: 0.2}}
training:
  num_tokens_per_step: 64
  num_tokens: {num_tokens}
  warmup_steps: 4
  log_every: 1
  validate_every: 100
  checkpoint_every: 50
  device: cpu
"""
PAIR = "# @package _global_\ndefaults:\n  - /experiment/small\n\npair: {pair}\n"
SITE = "export SBATCH_TIMELIMIT=60 RANKS_PER_NODE=${RANKS_PER_NODE:-2}\n"  # nodes without GPUs
NUM_STEPS = 400


@dataclass(frozen=True)
class Checkout:
    """The code in a folder of its own, with `experiment=small` and `small/base_tuned`, and `slurm/site.sh`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, site: str = SITE) -> Checkout:
        for name in PARTS:
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
        model, corpus = prepare_base_model(folder), folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(record) + "\n" for record in map(_document, range(48))))
        experiments = folder / "configs" / "experiment"
        (experiments / "small.yaml").write_text(
            EXPERIMENT.format(model=model, adapters=ADAPTERS, corpus=corpus, num_tokens=64 * NUM_STEPS)
        )
        (experiments / "small").mkdir()
        for pair in ("base_tuned", "base_third"):
            (experiments / "small" / f"{pair}.yaml").write_text(PAIR.format(pair=pair))
        (folder / "slurm" / "site.sh").write_text(site)
        return cls(folder)

    @property
    def store(self) -> Path:
        return self.folder / "outputs" / "small" / "store"

    def run(self, outputs: str = "small") -> Path:
        """The run folder of `small/base_tuned` with outputs=outputs/<outputs>."""
        return self.folder / "outputs" / outputs / "runs" / "base_tuned"

    def train(self, cluster: Cluster, outputs: str, *options: str, settings: Sequence[str] = (), **more: str) -> str:
        """Submit a training of `small/base_tuned` on the study's store, with outputs of its own."""
        own = ["experiment=small/base_tuned", f"outputs=outputs/{outputs}", f"store={self.store}", *settings]
        return cluster.sbatch("--time=60", *options, "slurm/train.sh", *own, cwd=self.folder, **more)


@dataclass(frozen=True)
class Studied:
    """A study whose jobs have ended in `state`; their numbers by the stages' names."""

    checkout: Checkout
    jobs: dict[str, str]
    state: str


def _document(number: int) -> dict[str, object]:
    """Plain text and chats in turn, of several lengths."""
    words = " ".join(f"word{number}x{j}" for j in range(3 + number % 7))
    chat = [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": words}]
    return {"doc_id": f"d{number}", **({"messages": chat} if number % 2 else {"text": words})}


def steps_of(run: Path) -> list[int]:
    """The steps that are logged whole, in the order of the file."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def until(cluster: Cluster, job: str, ready: Callable[[], bool], timeout: float = 300) -> None:
    """Wait for what a job is to bring about."""
    end_at = time.monotonic() + timeout
    while not ready():
        state = cluster.state(job)
        in_vain = "FAILED" in state or time.monotonic() > end_at
        assert not in_vain, f"{job} is {state} after {timeout} s at most\n{cluster.log(job)}"
        time.sleep(LOOK_S)
