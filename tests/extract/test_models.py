"""What a cut model computes: the hidden states of the full one, for every architecture and way of attending."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from extract.codecs import CODECS
from extract.command import compose
from extract.config import CODECS as CODEC_NAMES
from extract.config import ExtractSettings, ModelConfig
from extract.errors import BadInput
from extract.manifest import Manifest
from extract.models import blocks_of, check_model, load_blocks, load_tokenizer
from extract.stores import ActivationStore, TokenStore
from extract.weights import identity, weights_of
from tests import tiny
from tests.extract.test_activations import run

NUM_BLOCKS, WIDTH, VOCABULARY = 4, 32, 300
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
# Gemma-2: a window of 8 tokens in every other block, and a cap so low that it changes most attention weights.
GEMMA2 = transformers.Gemma2Config(
    **COMMON, head_dim=8, sliding_window=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=8
)
FAMILIES = {
    "gemma2": GEMMA2,
    "llama": transformers.LlamaConfig(**COMMON),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=NUM_BLOCKS, n_head=4, n_positions=512, initializer_range=0.3
    ),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=8),
}


def save_family(family: str, folder: Path, seed: int = 0) -> Path:
    """A random model of the architecture, with the small tokenizer."""
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def full_states(model: Path, token_ids: np.ndarray, attention: str = "eager") -> tuple[torch.Tensor, ...]:
    """`output_hidden_states` of the whole model in float32 for one document without batch or padding; state b + 1 is
    the residual stream after block b, but for the last block, where transformers gives it after the final norm.
    """
    full = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).float().eval()
    with torch.no_grad():
        states = full(torch.from_numpy(token_ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    return tuple(state[0] for state in states)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_activations_are_the_full_models_hidden_states(family: str, study: list[str], tmp_path: Path):
    """Batched with padding, cut after block 2 and stored in float32, at two hookpoints in one pass."""
    models = {name: save_family(family, tmp_path / name, seed) for seed, name in enumerate(("base", "tuned"))}
    places = [f"models.{name}={place}" for name, place in models.items()]
    settings = run(
        [*study, *places, "models.base.dtype=float32", "models.tuned.dtype=float32", "hookpoints=[block0,block2]"]
    )
    for name, place in models.items():
        stores = {b: ActivationStore(settings.activations_folder(name, f"block{b}")) for b in (0, 2)}
        tokens = TokenStore(settings.tokens_folder)
        for i in range(0, tokens.num_documents, 7):
            states = full_states(place, tokens.document(i).token_ids)
            for block, store in stores.items():
                torch.testing.assert_close(store.document(i), states[block + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_keeps_hidden_states_within_its_bound(codec: str, study: list[str]):
    """The bounds of `extract.codecs`, from the values of the full model and the scales that are stored."""
    places = ["models.base.dtype=float32", "models.tuned.dtype=float32"]
    settings = run([*study, *places, f"activations.codec={codec}"])
    store = ActivationStore(settings.activations_folder("base", "block1"))
    assert store.manifest.dtype == codec
    token_ids = TokenStore(settings.tokens_folder).document(3).token_ids
    x_ND = full_states(Path(settings.models["base"].id), token_ids)[2]
    scales = store.encoded(3).scales_N
    scales_N1 = torch.zeros(len(x_ND), 1) if scales is None else scales[:, None]
    bound_ND = {
        "fp32": x_ND.abs() * 0,
        "bf16": x_ND.abs() * 2**-8,
        "fp16": (x_ND.abs() * 2**-11).clamp(min=2**-25),
        "fp8": torch.maximum(x_ND.abs() * 2**-4, scales_N1 * 2**-10),
        "int8": scales_N1 / 2 + x_ND.abs() * 0,
    }[codec]
    error_ND = (store.document(3).float() - x_ND).abs()
    assert (error_ND <= bound_ND + 1e-4 * (1 + x_ND.abs())).all()  # and the rounding of two orders of summation
    assert codec == "fp32" or error_ND.max() > bound_ND.max() / 100  # the codec was really applied


def test_the_codecs_of_the_settings_are_those_of_the_format():
    assert tuple(CODECS) == CODEC_NAMES


@pytest.mark.parametrize("attention", [None, "eager"])
def test_gemma2_attention_logits_are_capped(attention: str | None, tmp_path: Path):
    """The cap of 0.5 moves the hidden states far; the default and eager both have it."""
    model = save_family("gemma2", tmp_path / "gemma2")
    ids = np.arange(1, 60)
    cut = load_blocks("base", ModelConfig(str(model), dtype="float32", attention=attention), ["block2"])
    acts_ND = cut.activations(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.long))["block2"][0]
    torch.testing.assert_close(acts_ND, full_states(model, ids)[3], rtol=1e-4, atol=1e-4)
    config = transformers.AutoConfig.from_pretrained(model)
    config.attn_logit_softcapping = None
    config.save_pretrained(model)
    assert (acts_ND - full_states(model, ids)[3]).norm() > 0.1 * acts_ND.norm()


def test_attention_without_soft_capping_is_refused_where_it_matters(tmp_path: Path):
    gemma = ModelConfig(str(save_family("gemma2", tmp_path / "gemma2")), attention="sdpa")
    with pytest.raises(BadInput, match="models.base.attention=sdpa leaves out the soft-capping"):
        check_model("base", gemma, ["block1"])
    llama = ModelConfig(str(save_family("llama", tmp_path / "llama")), attention="sdpa")
    assert check_model("base", llama, ["block1"]) == WIDTH


def test_a_width_that_was_promised_is_checked_and_is_no_part_of_the_identity(tmp_path: Path):
    folder = str(save_family("llama", tmp_path / "llama"))
    plain, promised = ModelConfig(folder), ModelConfig(folder, d_model=WIDTH)
    assert check_model("base", promised, ["block1"]) == WIDTH
    weights: dict = {"commit": None, "files": {}, "adapter": {}}
    assert identity("base", promised, weights) == identity("base", plain, weights)
    with pytest.raises(BadInput, match=f"models.base.d_model=999, but .* has width {WIDTH}"):
        check_model("base", ModelConfig(folder, d_model=999), ["block1"])


@pytest.mark.parametrize("with_adapter", [False, True])
def test_blocks_beyond_the_cut_and_the_head_are_never_built(
    tiny_models: dict[str, Path], tmp_path: Path, with_adapter: bool
):
    adapter = str(tiny.save_adapter(tiny_models["base"], tmp_path / "adapter")) if with_adapter else None
    cut = load_blocks("base", ModelConfig(str(tiny_models["base"]), adapter=adapter), ["block0", "block1"])
    shapes = [tuple(parameter.shape) for parameter in cut.decoder.parameters()]
    assert sum(300 in shape for shape in shapes) == 1  # the embedding; a head would be a second one
    assert sum(shape == (16, 32) for shape in shapes) == 2  # one mlp.down_proj for each of two blocks
    assert {parameter.dtype for parameter in cut.decoder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_model_spread_over_devices_computes_the_same(
    tiny_models: dict[str, Path], tmp_path: Path, with_adapter: bool
):
    adapter = str(tiny.save_adapter(tiny_models["base"], tmp_path / "adapter")) if with_adapter else None
    ids = torch.arange(1, 9)[None]
    acts = [
        load_blocks("base", ModelConfig(str(tiny_models["base"]), adapter=adapter, device_map=device_map), ["block2"])
        .activations(ids, torch.ones_like(ids))["block2"]
        .cpu()
        for device_map in (None, "auto")
    ]
    torch.testing.assert_close(acts[0], acts[1])


def test_weights_are_part_of_what_shards_are_made_with(study: list[str], tmp_path: Path):
    """Other weights under the same name are refused; hashes come from the cache while size and time stay."""
    model = tiny.save_model(tmp_path / "model", seed=3)
    settings = run([*study, f"models.tuned={model}"])
    files = Manifest.read(settings.activations_folder("tuned", "block1")).settings["model"]["weights"]["files"]
    assert set(files) == {"config.json", "model.safetensors"}
    tiny.save_model(model, seed=4)
    with pytest.raises(BadInput, match="model.weights.files.model.safetensors"):
        run([*study, f"models.tuned={model}"])


def test_models_may_be_moved_with_their_store(study: list[str], tiny_models: dict[str, Path], tmp_path: Path):
    """Model and adapter are told by what their files hold: elsewhere the same ones continue, others do not."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(tiny_models["base"], before / "model")
    tiny.save_adapter(tiny_models["base"], before / "adapter")

    def overrides(place: Path) -> list[str]:
        return [*study, f"models.tuned={place}/model", f"models.tuned.adapter={place}/adapter"]

    folder = run(overrides(before)).activations_folder("tuned", "block1")
    content = Manifest.read(folder).content_sha256()
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.index").unlink()
    before.rename(after)
    run(overrides(after))
    assert Manifest.read(folder).content_sha256() == content
    tiny.save_adapter(tiny.save_model(tmp_path / "shallow", num_blocks=3), after / "adapter")
    with pytest.raises(BadInput, match="model.weights.adapter.adapter_model.safetensors"):
        run(overrides(after))


def test_a_hub_model_and_a_hub_adapter_are_part_of_what_shards_are_made_with():
    config = ModelConfig("org/model", "main", adapter="org/adapter", adapter_revision="v1", device_map="auto")
    weights = {"commit": "0" * 40, "files": {}, "adapter": {"adapter_model.safetensors": "1" * 64}}
    assert identity("tuned", config, weights) == {
        "name": "tuned",
        "id": "org/model",
        "revision": "main",
        "gguf": None,
        "adapter": "org/adapter",
        "adapter_revision": "v1",
        "dtype": "bfloat16",
        "attention": None,
        "weights": weights,
    }


def test_a_hub_adapter_has_a_revision(study: list[str], tiny_models: dict[str, Path], tmp_path: Path):
    """Two commits in the hub's cache, laid out as the hub's client does; the client itself without a network."""
    commits = {"v1": "1" * 40, "v2": "2" * 40}
    repository = tmp_path / "hub/models--org--adapter"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        saved = tiny.save_adapter(tiny_models["base"], repository / "snapshots" / commit)
        (saved / "revision").write_text(revision)
        (repository / "refs" / revision).write_text(commit)
    code = (
        "from extract.adapters import adapter_folder; from extract.config import ModelConfig\n"
        "for revision in ('v1', 'v2', 'v3'):\n"
        "    config = ModelConfig('org/model', adapter='org/adapter', adapter_revision=revision)\n"
        "    print((adapter_folder('tuned', config) / 'revision').read_text())"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["v1", "v2"]
    assert "models.tuned: the adapter of org/adapter could not be loaded" in done.stderr
    with pytest.raises(BadInput, match="adapter_revision=v1 needs models.tuned.adapter"):
        compose(ExtractSettings, [*study, "models.tuned.adapter_revision=v1"])


def test_the_blocks_are_those_of_the_text_decoder(tmp_path: Path):
    """A model that also reads images, whose vision tower has more blocks than the text decoder."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=9, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    full = transformers.Gemma3ForConditionalGeneration(config).eval()
    full.save_pretrained(tmp_path)
    cut = load_blocks("base", ModelConfig(str(tmp_path), dtype="float32"), ["block0", "block2"])
    assert not any("vision" in name for name, _ in cut.decoder.named_parameters())
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        states = full.model.language_model(ids, output_hidden_states=True).hidden_states
    for name, acts in cut.activations(ids, torch.ones_like(ids)).items():
        torch.testing.assert_close(acts, states[int(name[-1]) + 1], rtol=1e-4, atol=1e-4)


def test_a_list_within_blocks_is_not_taken_for_them():
    """Experts in lists as long as that of the blocks, and longer; one more list of the same length beside it."""
    experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(n))}) for n in (3, 3, 8)]
    blocks = nn.ModuleList(experts)
    model = nn.ModuleDict({"norms": nn.ModuleList(nn.LayerNorm(4) for _ in range(3)), "layers": blocks})
    assert blocks_of(model, 3) is blocks
    with pytest.raises(BadInput, match="keeps its 5 blocks in no ModuleList"):
        blocks_of(model, 5)


def test_hashes_are_kept_while_size_and_time_of_a_file_stay(tiny_models: dict[str, Path], tmp_path: Path):
    """A planted hash is believed until the file is touched; then the true one comes back."""
    model = shutil.copytree(tiny_models["base"], tmp_path / "model")
    true = weights_of("base", ModelConfig(str(model)), tmp_path)["files"]
    cache = tmp_path / "hashes.json"
    cache.write_text(cache.read_text().replace(true["model.safetensors"], "planted"))
    assert weights_of("base", ModelConfig(str(model)), tmp_path)["files"]["model.safetensors"] == "planted"
    os.utime(model / "model.safetensors", (1, 1))
    assert weights_of("base", ModelConfig(str(model)), tmp_path)["files"] == true
    assert true["model.safetensors"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def test_a_hub_models_commit_is_recorded(study: list[str], tmp_path: Path):
    """The hub's cache, laid out as the hub's client does, and the client itself without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--org--tiny"
    tiny.save_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    overrides = [*study, "models.tuned=org/tiny", "models.tuned.revision=main"]
    for command in ("extract.tokens", "extract.activations"):
        done = subprocess.run(
            [sys.executable, "-m", command, *overrides], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    settings = compose(ExtractSettings, overrides)
    weights = Manifest.read(settings.activations_folder("tuned", "block1")).settings["model"]["weights"]
    assert weights == {"commit": commit, "files": {}, "adapter": {}}


def test_the_last_block_is_taken_before_the_final_norm(study: list[str], tiny_models: dict[str, Path]):
    model = load_blocks("base", ModelConfig(str(tiny_models["base"]), dtype="float32"), ["block3"])
    full = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["base"]).eval()
    ids = torch.arange(1, 9)[None]
    caught = []
    full.model.layers[3].register_forward_hook(lambda m, i, o: caught.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        full(ids)
    torch.testing.assert_close(model.activations(ids, torch.ones_like(ids))["block3"], caught[0])


def test_merged_adapter_equals_the_adapted_model(tiny_models: dict[str, Path], tmp_path: Path):
    adapter = tiny.save_adapter(tiny_models["base"], tmp_path / "adapter")
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


@pytest.mark.parametrize(("blocks", "is_the_same"), [([2, 3], True), ([1, 3], False)])
def test_adapted_blocks_beyond_the_cut_change_nothing(
    tiny_models: dict[str, Path], tmp_path: Path, blocks: list[int], is_the_same: bool
):
    adapter = tiny.save_adapter(tiny_models["base"], tmp_path / "adapter", blocks)
    ids = torch.arange(1, 9)[None]
    acts = [
        load_blocks("base", ModelConfig(str(tiny_models["base"]), adapter=folder), ["block1"]).activations(
            ids, torch.ones_like(ids)
        )["block1"]
        for folder in (None, str(adapter))
    ]
    assert torch.equal(*acts) == is_the_same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_that_adds_nothing_changes_no_bit(tiny_models: dict[str, Path], tmp_path: Path, dtype: str):
    """B = 0: parameters are rounded as without an adapter, and what positions become is not rounded at all."""
    adapter = tiny.save_adapter(tiny_models["base"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: w if "lora_A" in name else w * 0 for name, w in weights.items()}, adapter / "adapter_model.safetensors"
    )
    ids = torch.arange(1, 201)[None]
    acts = [
        load_blocks("base", ModelConfig(str(tiny_models["base"]), adapter=folder, dtype=dtype), ["block1"]).activations(
            ids, torch.ones_like(ids)
        )["block1"]
        for folder in (None, str(adapter))
    ]
    assert acts[0].dtype == getattr(torch, dtype) and torch.equal(*acts)


@pytest.mark.parametrize("other", [{"width": 32}, {"num_blocks": 6}])
def test_adapter_of_another_model_is_refused(tiny_models: dict[str, Path], tmp_path: Path, other: dict):
    adapter = tiny.save_adapter(tiny.save_model(tmp_path / "other", **other), tmp_path / "adapter")
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


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_model_files_are_one_clear_error(tmp_path: Path, file: str):
    model = tiny.save_model(tmp_path / "damaged")
    (model / file).write_bytes((model / file).read_bytes()[:100])
    with pytest.raises(BadInput, match="models.base: the .* could not be loaded"):
        load_blocks("base", ModelConfig(str(model)), ["block1"])


def test_an_attention_that_transformers_does_not_know_is_refused(tiny_models: dict[str, Path]):
    with pytest.raises(BadInput, match="models.base: the model of .* could not be loaded"):
        load_blocks("base", ModelConfig(str(tiny_models["base"]), attention="egaer"), ["block1"])
