"""Writing shards against Python's tarfile, in memory: the same samples, once in each way, timed in turn.

python -m benchmarks.bench_writing [folder=/dev/shm]

Python's own means come in four amounts of work, because each of the first three leaves out something:
    tarfile             the members are bytes already; no hash
    tarfile + sha256    the members are bytes already; the archive is hashed afterwards
    plain writer        safetensors.torch.save of every tensor, tarfile, sha256
    plain shard         the same, after finite values, norms and float64 statistics in ordinary torch operations
`ShardWriter` starts from tensors and hashes, like the plain writer; `write_activation_shard` does all that the plain
shard does. No way of writing that hashes can be faster than `sha256`, which is shown on its own.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.timing import machine, ratio
from extract.archive import ShardWriter
from extract.codecs import CODECS, Encoded
from extract.made_with import start_folder
from extract.shards import activation_members, key_of, token_members, write_activation_shard, write_tokens
from extract.stores import TokenDocument, TokenStore

SHAPES = [  # documents, tokens of each, d_model: Gemma-2-9b, the demo's model
    (4, 4096, 3584),
    (32, 512, 3584),
    (256, 256, 576),
]
NUM_TOKEN_DOCUMENTS, TOKENS = 4000, 512


def main() -> None:
    root = Path(dict(argument.split("=") for argument in sys.argv[1:]).get("folder", "/dev/shm"))
    print(machine())
    with tempfile.TemporaryDirectory(dir=root) as folder:
        compare_tokens(Path(folder))
        for shape in SHAPES:
            compare_activations(Path(folder), *shape)


def compare_activations(folder: Path, num_documents: int, num_tokens: int, d_model: int) -> None:
    """Activations (num_tokens, d_model) of every document, with their norms."""
    acts = [torch.randn(num_tokens, d_model).bfloat16() for _ in range(num_documents)]
    norms = [acts_ND.double().norm(dim=1) for acts_ND in acts]
    members = [activation_members(Encoded(acts_ND), norms_N) for acts_ND, norms_N in zip(acts, norms, strict=True)]
    data = [b"".join(member["safetensors"]) for member in members]
    names = [f"{key_of(i)}.safetensors" for i in range(num_documents)]
    size = sum(map(len, data))
    print(f"\nactivations: {num_documents} documents of {num_tokens} tokens, D={d_model}: {size / 1e9:.2f} GB")
    pairs = list(zip(acts, norms, strict=True))
    writer = partial(write_samples, folder, [partial(sample, *pair) for pair in pairs])
    for name, slow in (
        ("sha256", partial(hash_all, data)),
        ("tarfile", partial(tar, folder, names, data)),
        ("tarfile + sha256", partial(hashed_tar, folder, names, data)),
        ("plain writer", partial(hashed_tar, folder, names, lambda: (saved(*pair) for pair in pairs))),
    ):
        report(size, name, slow, "ShardWriter", writer)
    tokens = documents_of(folder / f"{num_documents}-{num_tokens}", [num_tokens] * num_documents)
    plain_shard = partial(hashed_tar, folder, names, lambda: measured(acts))
    for codec in CODECS:
        whole = partial(write_whole, folder, tokens, acts, codec)
        report(size, "plain shard", plain_shard, f"write_activation_shard, {codec}", whole)


def compare_tokens(folder: Path) -> None:
    """Token samples: many small members, where the work per member counts."""
    documents = [
        TokenDocument(key_of(i), f"doc{i}", "bench", np.arange(TOKENS), text="word " * TOKENS)
        for i in range(NUM_TOKEN_DOCUMENTS)
    ]
    members = [token_members(document) for document in documents]
    names = [f"{key_of(i)}.{extension}" for i, sample in enumerate(members) for extension in sample]
    data = [part for sample in members for part in sample.values()]
    size = sum(map(len, data))
    print(f"\ntokens: {NUM_TOKEN_DOCUMENTS} documents of {TOKENS} tokens: {size / 1e6:.0f} MB")
    writer = partial(write_samples, folder, [partial(dict, sample) for sample in members])
    report(size, "tarfile", partial(tar, folder, names, data), "ShardWriter", writer)
    report(size, "tarfile + sha256", partial(hashed_tar, folder, names, data), "ShardWriter", writer)


def report(size: int, slow_name: str, slow: Callable, fast_name: str, fast: Callable) -> None:
    slow_seconds, fast_seconds, times = ratio(slow, fast, repeats=5)
    print(
        f"  {slow_name} {size / slow_seconds / 1e9:.2f} GB/s, {fast_name} {size / fast_seconds / 1e9:.2f} GB/s: "
        f"{times:.2f} times"
    )


def tar(folder: Path, names: list[str], data: list[bytes] | Callable[[], Iterator[bytes]]) -> None:
    path = folder / "plain.tar"
    path.unlink(missing_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in zip(names, data() if callable(data) else data, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def hashed_tar(folder: Path, names: list[str], data: list[bytes] | Callable[[], Iterator[bytes]]) -> str:
    tar(folder, names, data)
    with open(folder / "plain.tar", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def saved(acts_ND: Tensor, norms_N: Tensor) -> bytes:
    return safetensors.torch.save({"acts": acts_ND, "norms": norms_N.float()})


def measured(acts: list[Tensor]) -> Iterator[bytes]:
    """Each document saved, after the checks and sums that a shard's index needs; they are bound by memory."""
    for acts_ND in acts:
        assert torch.isfinite(acts_ND).all()
        x_ND = acts_ND[1:].double()
        _ = x_ND.sum(0), x_ND.square().sum(0), float(x_ND.norm(dim=1).sum())
        yield saved(acts_ND, acts_ND.float().norm(dim=1))


def hash_all(data: list[bytes]) -> str:
    digest = hashlib.sha256()
    for content in data:
        digest.update(content)
    return digest.hexdigest()


def sample(acts_ND: Tensor, norms_N: Tensor) -> dict:
    return activation_members(Encoded(acts_ND), norms_N)


def write_samples(folder: Path, samples: list[Callable[[], dict]]) -> None:
    shutil.rmtree(folder / "ours", ignore_errors=True)
    with ShardWriter(folder / "ours", 0) as writer:
        for i, make in enumerate(samples):
            writer.add(key_of(i), make(), 1)
        writer.finish()


def write_whole(folder: Path, tokens: TokenStore, acts: list[Tensor], codec: str) -> None:
    shutil.rmtree(folder / "whole", ignore_errors=True)
    documents = zip(tokens.keys, acts, strict=True)
    settings = {"skip_first_tokens": 1, "codec": codec}
    start_folder(folder / "whole", settings)
    write_activation_shard(folder / "whole", 0, tokens, range(len(acts)), documents, settings)


def documents_of(store: Path, lengths: list[int]) -> TokenStore:
    documents = (TokenDocument("", str(i), "bench", np.arange(length)) for i, length in enumerate(lengths))
    write_tokens(store, documents, tokens_per_shard=sum(lengths))
    return TokenStore(store / "tokens")


if __name__ == "__main__":
    main()
