import errno
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from extract import archive
from extract.activations import extract
from extract.background import Background
from extract.batches import length_batches
from extract.command import compose
from extract.config import ExtractSettings, ModelConfig
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.models import load_blocks
from extract.stores import ActivationStore
from extract.tokens import make_tokens
from extract.verify import problems
from tests import tiny


def run(overrides: list[str]) -> ExtractSettings:
    settings = compose(ExtractSettings, overrides)
    make_tokens(settings)
    extract(settings)
    return settings


def test_each_stored_activation_is_the_full_models_hidden_state(study: list[str]):
    """Batched, cut and stored in float32 = an unbatched forward of the whole model, document by document."""
    settings = run([*study, "models.base.dtype=float32", "models.tuned.dtype=float32", "hookpoints=[block0,block2]"])
    tokens = make_tokens(settings)
    for name in ("base", "tuned"):
        full = transformers.AutoModelForCausalLM.from_pretrained(settings.models[name].id).eval()
        stores = {b: ActivationStore(settings.activations_folder(name, f"block{b}")) for b in (0, 2)}
        for i, document in enumerate(tokens):
            ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
            with torch.no_grad():
                states = full(ids, output_hidden_states=True).hidden_states
            for block, store in stores.items():
                torch.testing.assert_close(store.document(i), states[block + 1][0], rtol=1e-4, atol=1e-4)


def test_bf16_stays_near_float32(study: list[str]):
    settings = run([*study, "models.tuned.dtype=float32"])
    exact = load_blocks("base", ModelConfig(settings.models["base"].id, dtype="float32"), ["block1"])
    store = ActivationStore(settings.activations_folder("base", "block1"))
    assert store.manifest.dtype == "bf16"
    document = make_tokens(settings).document(0)
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    expected = exact.activations(ids, torch.ones_like(ids))["block1"][0]
    assert (store.document(0).float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["models.tuned=/no/such/folder"], "is not a folder"),
        (["models.tuned.adapter=missing_adapter"], "is not a folder"),
        (["models.tuned.gguf=missing.gguf"], "missing.gguf"),
        (["hookpoint=block9"], "block9 is beyond"),
        (["models.tuned=WIDE"], "pairs.base_tuned: its models have different widths .base 16, tuned 32"),
        (["models.tuned=EMPTY"], "holds no weights"),
        (["models.tuned.adapter=OTHER"], "belongs to another model"),
        (["models.tuned=SHORT"], r"hold a document of \d+, models.tuned has 16 positions.*corpus.context_length=16"),
    ],
)
def test_a_mistake_in_any_model_is_found_before_any_work_and_can_be_mended(
    study: list[str], tmp_path: Path, mistake: list[str], message: str
):
    """Nothing is written for the sound model either, and the mended command is not refused for the mistake's sake."""
    tiny.save_model(tmp_path / "WIDE", width=32)
    (tiny.save_model(tmp_path / "EMPTY") / "model.safetensors").unlink()
    tiny.save_adapter(tmp_path / "WIDE", tmp_path / "OTHER")
    config = tiny.save_model(tmp_path / "SHORT") / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 16'))
    setting, _, value = mistake[0].partition("=")
    place = f"{setting}={tmp_path / value}" if (tmp_path / value).exists() else mistake[0]
    make_tokens(compose(ExtractSettings, study))
    with pytest.raises(BadInput, match=message):
        extract(compose(ExtractSettings, [*study, place]))
    settings = compose(ExtractSettings, study)
    assert not list(settings.tokens_folder.parent.glob("activations/**/*"))
    extract(settings)


def test_batches_hold_each_document_once_within_the_budget():
    lengths = np.array([3, 50, 7, 7, 100, 1, 30])
    batches = list(length_batches(lengths, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 64 for batch in batches)
    assert batches[0] == [4]  # longer than the budget: alone


def test_batches_waste_as_little_as_any_split_of_the_sorted_documents():
    """Against every split of eight lengths: tokens computed plus 1/64 of the budget a batch."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = np.sort(rng.integers(1, 40, 8))[::-1]

        def cost(batches: list[list[int]], lengths: np.ndarray = lengths) -> float:
            return sum(len(batch) * lengths[batch].max() + 64 / 64 for batch in batches)

        splits = []
        for cuts in range(2**7):
            edges = [0, *(i + 1 for i in range(7) if cuts >> i & 1), 8]
            batches = [list(range(start, end)) for start, end in pairwise(edges)]
            if all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 64 for batch in batches):
                splits.append(cost(batches))
        assert cost(list(length_batches(lengths, 64))) == min(splits)


def test_an_error_in_the_background_stops_the_work():
    """At the next submission, or at the end of the block; an error of the block itself goes first."""

    def fail() -> None:
        raise BadInput("from the background")

    done: list[int] = []
    with pytest.raises(BadInput, match="from the background"), Background() as background:
        background.submit(fail)
        background.submit(lambda: done.append(1))
    with pytest.raises(BadInput, match="from the background"), Background() as background:
        background.submit(lambda: done.append(2))
        background.submit(fail)
    with pytest.raises(KeyError), Background() as background:
        background.submit(fail)
        raise KeyError("from the block")
    assert done == [2]


def test_manifests_hold_the_composed_settings(study: list[str]):
    settings = run(study)
    for folder in (settings.tokens_folder, settings.activations_folder("tuned", "block1")):
        composed = Manifest.read(folder).provenance["composed"]
        assert composed["corpus"]["tokens_per_shard"] == 500 and composed["composed_from"] == settings.composed_from


def test_a_second_run_computes_only_what_is_missing(study: list[str], monkeypatch: pytest.MonkeyPatch):
    settings = run(study)
    folder = settings.activations_folder("tuned", "block1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    for name in ("shard-00001.index", "shard-00001.tar", "manifest.json"):
        (folder / name).unlink()
    extract(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [p.name for p in folder.glob("*.tar") if p.stat().st_mtime_ns != written[p.name]] == ["shard-00001.tar"]


def test_killed_extraction_continues_to_the_same_bytes(study: list[str], tmp_path: Path):
    whole = run(study)
    other = [o for o in study if not o.startswith("outputs=")] + [f"outputs={tmp_path / 'other'}"]
    make_tokens(compose(ExtractSettings, other))
    process = subprocess.Popen([sys.executable, "-m", "extract.activations", *other], stderr=subprocess.DEVNULL)
    folder = tmp_path / "other/store/activations/base/block1"
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.tar*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    extract(compose(ExtractSettings, other))
    for name in ("base", "tuned"):
        for path in whole.activations_folder(name, "block1").glob("shard-*"):
            assert path.read_bytes() == (tmp_path / f"other/store/activations/{name}/block1" / path.name).read_bytes()


def test_activations_of_other_tokens_are_refused(study: list[str]):
    settings = run(study)
    for path in settings.tokens_folder.iterdir():
        path.unlink()
    changed = compose(ExtractSettings, [*study, "corpus.context_length=12"])
    make_tokens(changed)
    with pytest.raises(BadInput, match="tokens_sha256"):
        extract(changed)


def test_values_that_are_not_finite_name_model_and_document(study: list[str], tmp_path: Path):
    broken = tiny.save_model(tmp_path / "broken")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    settings = compose(ExtractSettings, [*study, f"models.tuned={broken}"])
    make_tokens(settings)
    with pytest.raises(
        BadInput, match=r"tuned/block1: activations of document 000000000 \(doc_id 'd0'\) are not finite"
    ):
        extract(settings)
    assert ActivationStore(settings.activations_folder("base", "block1")).num_documents == 40


def test_no_space_left_is_one_line_and_keeps_what_is_finished(study: list[str], monkeypatch: pytest.MonkeyPatch):
    """The disk fills while the second shard is written: the first stays, the half-written one goes."""
    settings = compose(ExtractSettings, study)
    make_tokens(settings)
    real, calls = archive.ShardWriter._write, []

    def full_disk(writer: archive.ShardWriter, *pieces: object) -> None:
        if writer.path.name == "shard-00001.tar":
            calls.append(pieces)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.path))
        real(writer, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(archive.ShardWriter, "_write", full_disk)
        with pytest.raises(OSError, match="shard-00001.tar"):
            extract(settings)
    folder = settings.activations_folder("base", "block1")
    assert calls and sorted(p.name for p in folder.glob("shard-*")) == ["shard-00000.index", "shard-00000.tar"]
    extract(settings)
    assert not list(problems(settings))


def test_commands_end_with_one_line_for_bad_input(study: list[str]):
    for command, argument, message in [
        ("extract.tokens", "hookpint=block1", "hookpint is not a setting. Did you mean hookpoint?"),
        ("extract.activations", "seed=1", "has no manifest.json"),
        ("extract.verify", "mode=slow", "mode=slow is neither fast nor full"),
    ]:
        done = subprocess.run([sys.executable, "-m", command, *study, argument], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr and "Traceback" not in done.stderr


def test_help_names_the_experiments_and_the_settings():
    done = subprocess.run([sys.executable, "-m", "extract.tokens", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "demo/base_simpo" in done.stdout
    assert "corpus.context_length=1024" in done.stdout and "composed_from" not in done.stdout
    assert "crosscoder" not in done.stdout.split("experiment=NAME")[1]


def test_a_path_that_the_disk_refuses_is_one_line(study: list[str], tmp_path: Path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "extract.tokens", *study, f"store={tmp_path / 'file' / 'store'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Not a directory" in done.stderr and "Traceback" not in done.stderr
