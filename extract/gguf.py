"""A GGUF language model, converted once into an ordinary transformers folder.

transformers reads GGUF by itself, but slowly (tens of seconds each time), and the object it makes counts as quantised:
it can be neither cast nor trained. So its weights are copied into a model made from the config, which is then saved.
"""

import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from extract.errors import BadInput
from extract.publish import partial_of, rename

RECEIPT = "converted_from.json"


def convert_gguf(gguf_file: Path, folder: Path) -> Path:
    """Converts `gguf_file` into `folder` (config, tokenizer with chat template, bf16 safetensors) and returns `folder`.

    Every weight is rounded to bf16, by up to 2^-9 of its size: nothing for files in BF16, little beside the error of
    4-bit files, but more than that of Q8_0, F16 and F32. A folder whose receipt names this very file (by sha256) is
    complete and returned at once. It is written under a name of its own and renamed, so that several processes may
    convert one file: the first to finish gives the folder.

    Raises BadInput for a missing file, for one that is not GGUF, and for a folder that holds something else.
    """
    receipt = {"file": gguf_file.name, "sha256": _sha256_of_gguf(gguf_file)}
    if folder.exists():
        _check_receipt(folder, receipt)
        return folder
    partial = partial_of(folder)
    try:
        _ordinary_model(gguf_file).save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(partial)
        (partial / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
        _sync(partial)
        _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _check_receipt(folder, receipt)
    return folder


def _rename(partial: Path, folder: Path) -> None:
    """Make `partial` the folder, unless another process was first."""
    try:
        rename(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _sha256_of_gguf(gguf_file: Path) -> str:
    if not gguf_file.is_file():
        raise BadInput(f"gguf_file ({gguf_file}) does not exist. Give the path of a .gguf file.")
    with gguf_file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BadInput(
                f"gguf_file ({gguf_file}) does not start with the bytes GGUF. Give the path of a GGUF model."
            )
    state = gguf_file.stat()
    return _sha256(gguf_file, state.st_size, state.st_mtime_ns)


@functools.lru_cache
def _sha256(gguf_file: Path, size: int, modified_ns: int) -> str:
    """Once for each state of a file, for a command asks several times."""
    with gguf_file.open("rb") as stream:
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
