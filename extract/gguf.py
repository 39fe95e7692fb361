"""A GGUF language model, converted once into an ordinary transformers folder.

transformers reads GGUF by itself, but slowly (tens of seconds each time), and the object it makes counts as quantised:
it can be neither cast nor trained. So its weights are copied into a model made from the config, which is then saved.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from extract.errors import BadInput
from extract.publish import rename

RECEIPT = "converted_from.json"


def convert_gguf(gguf_file: Path, folder: Path) -> Path:
    """Converts `gguf_file` into `folder` (config, tokenizer with chat template, bf16 safetensors) and returns `folder`.

    bf16 loses nothing that a quantised file still has. A folder whose receipt names this very file (by sha256) is
    complete and returned at once; the receipt is written last, into `<folder>.partial`, which is then renamed.

    Raises BadInput for a missing file, for one that is not GGUF, and for a folder that holds something else.
    """
    receipt = {"file": gguf_file.name, "sha256": _sha256_of_gguf(gguf_file)}
    if folder.exists():
        _check_receipt(folder, receipt)
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _ordinary_model(gguf_file).save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(partial)
    (partial / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    _sync(partial)
    rename(partial, folder)
    return folder


def _sha256_of_gguf(gguf_file: Path) -> str:
    if not gguf_file.is_file():
        raise BadInput(f"gguf_file ({gguf_file}) does not exist. Give the path of a .gguf file.")
    with gguf_file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BadInput(
                f"gguf_file ({gguf_file}) does not start with the bytes GGUF. Give the path of a GGUF model."
            )
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_receipt(folder: Path, receipt: dict[str, str]) -> None:
    found = folder / RECEIPT
    if not found.is_file() or json.loads(found.read_text()) != receipt:
        raise BadInput(
            f"folder ({folder}) exists but is not the conversion of {receipt['file']}. "
            "Remove it, or choose another folder."
        )


def _ordinary_model(gguf_file: Path) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    return model


def _sync(folder: Path) -> None:
    """Brings every file and then the folder itself to disk, so that renaming publishes whole files."""
    for path in [*sorted(folder.iterdir()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
