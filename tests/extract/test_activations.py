import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from extract import archive
from extract.activations import extract, length_batches
from extract.command import compose
from extract.config import ExtractSettings, ModelConfig
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.models import load_blocks, load_tokenizer
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


def test_the_last_block_is_taken_before_the_final_norm(study: list[str], tiny_models: dict[str, Path]):
    model = load_blocks("base", ModelConfig(str(tiny_models["base"]), dtype="float32"), ["block3"])
    full = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["base"]).eval()
    ids = torch.arange(1, 9)[None]
    caught = []
    full.model.layers[3].register_forward_hook(lambda m, i, o: caught.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        full(ids)
    torch.testing.assert_close(model.activations(ids, torch.ones_like(ids))["block3"], caught[0])


def test_bf16_stays_near_float32(study: list[str]):
    settings = run([*study, "models.tuned.dtype=float32"])
    exact = load_blocks("base", ModelConfig(settings.models["base"].id, dtype="float32"), ["block1"])
    store = ActivationStore(settings.activations_folder("base", "block1"))
    assert store.manifest.dtype == "bfloat16"
    document = make_tokens(settings).document(0)
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    expected = exact.activations(ids, torch.ones_like(ids))["block1"][0]
    assert (store.document(0).float() - expected).norm() / expected.norm() < 0.03


def test_merged_adapter_equals_the_adapted_model(tiny_models: dict[str, Path], tmp_path: Path):
    adapter = save_adapter(tiny_models["base"], tmp_path / "adapter")
    config = ModelConfig(str(tiny_models["base"]), adapter=str(adapter), dtype="float32")
    cut = load_blocks("tuned", config, ["block1"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["base"])
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = adapted(ids, output_hidden_states=True).hidden_states[2]
    acts = cut.activations(ids, torch.ones_like(ids))["block1"]
    torch.testing.assert_close(acts, expected, rtol=1e-4, atol=1e-4)
    plain = load_blocks("base", ModelConfig(str(tiny_models["base"]), dtype="float32"), ["block1"])
    assert not torch.allclose(acts, plain.activations(ids, torch.ones_like(ids))["block1"], atol=1e-2)


def save_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter with random, not zero, B matrices."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("other", [{"width": 32}, {"num_blocks": 6}])
def test_adapter_of_another_model_is_refused(tiny_models: dict[str, Path], tmp_path: Path, other: dict):
    adapter = save_adapter(tiny.save_model(tmp_path / "other", **other), tmp_path / "adapter")
    with pytest.raises(BadInput, match="belongs to another model"):
        load_blocks("tuned", ModelConfig(str(tiny_models["base"]), adapter=str(adapter)), ["block1"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id": "/no/such/folder"}, "is not a folder"),
        ({"adapter": "missing_adapter"}, "is not a folder"),
        ({"gguf": "missing.gguf"}, "missing.gguf"),
    ],
)
def test_missing_files_are_named(tiny_models: dict[str, Path], config: dict, message: str):
    with pytest.raises(BadInput, match=message):
        load_blocks("tuned", ModelConfig(**{"id": str(tiny_models["base"]), **config}), ["block1"])


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="could not be loaded"):
        load_tokenizer("base", ModelConfig(str(tmp_path)))


def test_a_block_beyond_the_model_is_refused(tiny_models: dict[str, Path]):
    with pytest.raises(BadInput, match="block9 is beyond models.base.*has 4 blocks, block0 to block3"):
        load_blocks("base", ModelConfig(str(tiny_models["base"])), ["block9"])


def test_batches_hold_each_document_once_within_the_budget():
    lengths = np.array([3, 50, 7, 7, 100, 1, 30])
    batches = list(length_batches(lengths, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 64 for batch in batches)
    assert batches[0] == [4]  # longer than the budget: alone


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
    ],
)
def test_a_mistake_in_any_model_is_found_before_any_work_and_can_be_mended(
    study: list[str], tmp_path: Path, mistake: list[str], message: str
):
    """Nothing is written for the sound model either, and the mended command is not refused for the mistake's sake."""
    tiny.save_model(tmp_path / "WIDE", width=32)
    (tiny.save_model(tmp_path / "EMPTY") / "model.safetensors").unlink()
    save_adapter(tmp_path / "WIDE", tmp_path / "OTHER")
    setting, _, value = mistake[0].partition("=")
    place = f"{setting}={tmp_path / value}" if (tmp_path / value).exists() else mistake[0]
    make_tokens(compose(ExtractSettings, study))
    with pytest.raises(BadInput, match=message):
        extract(compose(ExtractSettings, [*study, place]))
    settings = compose(ExtractSettings, study)
    assert not list(settings.tokens_folder.parent.glob("activations/**/*"))
    extract(settings)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_model_files_are_one_clear_error(tmp_path: Path, file: str):
    model = tiny.save_model(tmp_path / "damaged")
    (model / file).write_bytes((model / file).read_bytes()[:100])
    with pytest.raises(BadInput, match="models.base: the .* could not be loaded"):
        load_blocks("base", ModelConfig(str(model)), ["block1"])


def test_an_attention_that_transformers_does_not_know_is_refused(tiny_models: dict[str, Path]):
    with pytest.raises(BadInput, match="models.base: the model of .* could not be loaded"):
        load_blocks("base", ModelConfig(str(tiny_models["base"]), attention="egaer"), ["block1"])


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

    def full_disk(writer: archive.ShardWriter, data: bytes) -> None:
        if writer.path.name == "shard-00001.tar":
            calls.append(data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.path))
        real(writer, data)

    with monkeypatch.context() as patch:
        patch.setattr(archive.ShardWriter, "_write", full_disk)
        with pytest.raises(OSError, match="shard-00001.tar"):
            extract(settings)
    folder = settings.activations_folder("base", "block1")
    assert calls and sorted(p.name for p in folder.glob("shard-*")) == ["shard-00000.index", "shard-00000.tar"]
    extract(settings)
    assert not list(problems(settings))


def test_verify_names_what_is_wrong(study: list[str]):
    settings = run(study)
    full = compose(ExtractSettings, [*study, "mode=full"])
    assert not list(problems(settings)) and not list(problems(full))
    shard = settings.activations_folder("base", "block1") / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert not list(problems(settings))  # fast looks at sizes
    assert [line for line in problems(full) if "base/block1/shard-00001.tar was altered" in line]
    shard.write_bytes(data[:-1])
    assert [line for line in problems(settings) if "shard-00001.tar has" in line]
    shard.unlink()
    index = settings.activations_folder("tuned", "block1") / "shard-00000.index"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"dtype": "float16"}))
    found = "\n".join(problems(settings))
    assert "shard-00001.tar is missing" in found and "tuned/block1/shard-00000.index was altered" in found


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
