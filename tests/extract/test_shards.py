import errno
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from extract.archive import ShardWriter, start_folder
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.shards import write_activations, write_tokens
from extract.stores import ActivationStore, TokenDocument, TokenStore

LENGTHS = [5, 9, 4, 12, 7, 3]


def documents() -> list[TokenDocument]:
    rng = np.random.default_rng(0)
    return [
        TokenDocument(
            "", f"doc{i}", "src", rng.integers(0, 2**32, n, dtype=np.uint32), text=f"text {i}", tags={"t": "v"}
        )
        for i, n in enumerate(LENGTHS)
    ]


def activations(dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(f"{i:09d}", torch.randn(n, 6, generator=generator).to(dtype)) for i, n in enumerate(LENGTHS)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_tokens(tmp_path, documents(), tokens_per_shard=15)
    write_activations(tmp_path, "base", "block1", activations())
    return tmp_path


def test_tokens_come_back(store: Path):
    tokens = TokenStore(store / "tokens")
    assert tokens.lengths.tolist() == LENGTHS and tokens.num_tokens == sum(LENGTHS)
    assert [list(r) for r in tokens.shard_documents()] == [[0, 1, 2], [3, 4], [5]]  # closed at 15 tokens or more
    for before, after in zip(documents(), tokens, strict=True):
        assert np.array_equal(before.token_ids, after.token_ids) and after.token_ids.dtype == np.uint32
        assert (after.doc_id, after.text, after.tags) == (before.doc_id, before.text, before.tags)
        assert after.content_sha256 == before.content_sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    write_tokens(tmp_path, documents(), tokens_per_shard=15)
    write_activations(tmp_path, "base", "block1", activations(dtype))
    acts = ActivationStore(tmp_path / "activations/base/block1")
    assert acts.d_model == 6 and acts.manifest.dtype == str(dtype).removeprefix("torch.")
    for i, (_, x) in enumerate(activations(dtype)):
        assert acts.document(i).dtype == dtype and torch.equal(acts.document(i), x)
        torch.testing.assert_close(acts.norms(i), x.float().norm(dim=1))


def test_statistics_leave_out_first_positions(store: Path):
    kept = torch.cat([x[1:] for _, x in activations()]).double()
    statistics = ActivationStore(store / "activations/base/block1").statistics
    assert statistics.count == len(kept)
    torch.testing.assert_close(statistics.mean, kept.mean(0))
    assert abs(statistics.mean_norm - float(kept.norm(dim=1).mean())) < 1e-9


def test_plain_webdataset_reads_every_shard(store: Path):
    seen = []
    for folder in ("tokens", "activations/base/block1"):
        shards = sorted(str(path) for path in (store / folder).glob("*.tar"))
        seen.append({s["__key__"]: s for s in webdataset.WebDataset(shards, shardshuffle=False)})
    assert list(seen[0]) == list(seen[1]) == [key for key, _ in activations()]
    for key, x in activations():
        assert torch.equal(safetensors.torch.load(seen[1][key]["safetensors"])["acts"], x)
        assert json.loads(seen[0][key]["json"])["doc_id"] == f"doc{int(key)}"


def test_index_offsets_are_those_of_the_archive(store: Path):
    for path in (store / "tokens").glob("*.tar"):
        with tarfile.open(path) as archive:
            members = [[m.name, m.offset_data, m.size] for m in archive]
        assert json.loads(path.with_suffix(".index").read_text())["members"] == members


def test_equal_content_gives_equal_bytes(store: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    write_tokens(other, documents(), tokens_per_shard=15)
    for path in (store / "tokens").glob("shard-*"):
        assert path.read_bytes() == (other / "tokens" / path.name).read_bytes()
    assert Manifest.read(store / "tokens").content_sha256() == Manifest.read(other / "tokens").content_sha256()


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0) as writer:
        writer.add("0", {"json": b"{}"}, 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_shard_and_leaves_no_partial(tmp_path: Path):
    """/dev/full refuses what is buffered, so the error comes from closing."""
    writer = ShardWriter(tmp_path, 0)
    with pytest.raises(OSError, match="shard-00000.tar") as raised, writer:
        writer._file.close()
        writer._file = open("/dev/full", "wb")  # noqa: SIM115 (the writer closes it)
        writer.add("0", {"json": b"{}"}, 1)
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_truncated_shard_is_named(store: Path):
    shard = store / "tokens/shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(BadInput, match=r"shard-00001.tar has \d+ bytes"):
        TokenStore(store / "tokens")


def test_altered_index_is_named(store: Path):
    index = store / "tokens/shard-00001.index"
    index.write_text(index.read_text().replace("000000003", "000000009"))
    with pytest.raises(BadInput, match="shard-00001.index was altered"):
        TokenStore(store / "tokens")


def test_altered_manifest_is_named(store: Path):
    path = store / "tokens/manifest.json"
    path.write_text(path.read_text().replace('"documents": 6', '"documents": 7'))
    with pytest.raises(BadInput, match="manifest.json was altered"):
        TokenStore(store / "tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda docs: docs[:-1], "are missing"),
        (lambda docs: [*docs, ("x", docs[0][1])], "go on after the last"),
        (lambda docs: [docs[1], docs[0], *docs[2:]], "are missing: got key"),
        (lambda docs: [(docs[0][0], docs[0][1][:-1]), *docs[1:]], r"have shape \(4, 6\)"),
        (lambda docs: [(docs[0][0], docs[0][1] * float("nan")), *docs[1:]], "not finite"),
        (lambda docs: [(docs[0][0], docs[0][1].double()), *docs[1:]], "store bfloat16"),
        (lambda docs: [docs[0], (docs[1][0], docs[1][1][:, :3]), *docs[2:]], "width 3"),
    ],
)
def test_activations_that_do_not_fit_the_tokens_are_refused(tmp_path: Path, change, message: str):
    write_tokens(tmp_path, documents(), tokens_per_shard=15)
    with pytest.raises(BadInput, match=message):
        write_activations(tmp_path, "base", "block1", change(activations()))
    assert not (tmp_path / "activations/base/block1/manifest.json").exists()


def test_a_folder_of_other_settings_is_refused(store: Path):
    with pytest.raises(BadInput, match="tokens_per_shard: 15 there, 99 now"):
        write_tokens(store, documents(), tokens_per_shard=99)


def test_settings_that_no_shard_was_made_with_are_replaced(tmp_path: Path):
    start_folder(tmp_path, {"model": "misspelt"})
    start_folder(tmp_path, {"model": {"id": "right", "dtype": "float32"}, "sizes": [1, 2]})
    (tmp_path / "shard-00000.tar").touch()
    with pytest.raises(BadInput, match=r"settings \(model.id: 'right' there, 'other' now; sizes.1: 2 there, 3 now\)"):
        start_folder(tmp_path, {"model": {"id": "other", "dtype": "float32"}, "sizes": [1, 3]})


def test_no_documents(tmp_path: Path):
    with pytest.raises(BadInput, match="no documents"):
        write_tokens(tmp_path, [])
