from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ["WANDB_MODE"] = "disabled"  # of this process and all that it starts; tests of tracking say otherwise
if not torch.cuda.is_available():
    # Read where Triton's own functions are defined, and other libraries import it: before all of them.
    os.environ["TRITON_INTERPRET"] = "1"

from tests import tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random Llamas with one tokenizer: model folders by name."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save_model(root / name, seed) for seed, name in enumerate(("base", "tuned"))}


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of several lengths, plain and chat in turn."""
    path = tmp_path_factory.mktemp("corpus") / "mixed.jsonl"
    records = []
    for i in range(40):
        words = " ".join(f"word{i}x{j}" for j in range(2 + i % 7))
        chat = [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": words}]
        records.append({"doc_id": f"d{i}", **({"messages": chat} if i % 2 else {"text": words})})
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def study(tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path) -> list[str]:
    """The command line of a study of the two tiny models on the small corpus."""
    return [
        "experiment=pair",
        f"models.base={tiny_models['base']}",
        f"models.tuned={tiny_models['tuned']}",
        f"corpus={corpus_file}",
        f"outputs={tmp_path / 'outputs'}",
        "hookpoint=block1",
        "corpus.tokens_per_shard=500",
        "activations.batch_tokens=256",
    ]
