"""Cross-entropy of whole models: that of the model's own logits, document by document, whatever is in its head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from extract import causal
from extract.batches import padded
from extract.causal import load_causal
from extract.config import ModelConfig
from extract.errors import BadInput
from extract.models import load_blocks
from tests import tiny
from tests.extract.test_models import COMMON, GEMMA2, save_family

# What heads do beside a product: Gemma-2 caps logits, Cohere and Granite scale them, Llama here shares the embedding.
HEADS = {
    "gemma2": transformers.Gemma2Config(**{**GEMMA2.to_dict(), "final_logit_softcapping": 2.0}),
    "cohere": transformers.CohereConfig(**COMMON, logit_scale=0.5, eos_token_id=1),
    "granite": transformers.GraniteConfig(**COMMON, logits_scaling=3.0),
    "tied": transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=4),
}
DOCUMENTS = [torch.arange(5, 5 + length) * 7 % 300 for length in (3, 1, 17, 8)]


def save_head(head: str, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(HEADS[head]).save_pretrained(folder)
    return folder


def whole(model: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").float().eval()


@torch.no_grad()
def by_hand(model: torch.nn.Module) -> float:
    """Each document alone, without padding: -sum log softmax(logits of token i)[token i + 1]."""
    total = 0.0
    for ids_N in DOCUMENTS:
        log_p_NV = model(ids_N[None]).logits[0].double().log_softmax(1)
        total -= sum(log_p_NV[i, ids_N[i + 1]].item() for i in range(len(ids_N) - 1))
    return total


def measured(model: causal.CausalModel) -> float:
    ids_BN, mask_BN = padded([ids.numpy() for ids in DOCUMENTS])
    total = model.summed_cross_entropy(model.hidden_states(ids_BN, mask_BN, {}), ids_BN, mask_BN)
    assert total.dtype == torch.float64
    return total.item()


@pytest.mark.parametrize("tokens_at_a_time", [1, 5, 1000])
@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_is_that_of_the_models_own_logits(head, tokens_at_a_time, tmp_path, monkeypatch):
    monkeypatch.setattr(causal, "LOGITS", 300 * tokens_at_a_time)
    folder = save_head(head, tmp_path)
    model = load_causal("base", ModelConfig(str(folder), dtype="float32"), ["block1"])
    assert measured(model) == pytest.approx(by_hand(whole(folder)), rel=1e-5)
    assert model.num_bytes == sum(weight.nbytes for weight in whole(folder).parameters())


def test_an_adapter_is_merged_as_in_extraction(tiny_models, tmp_path):
    from peft import PeftModel

    adapter = tiny.save_adapter(tiny_models["base"], tmp_path / "adapter")
    config = ModelConfig(str(tiny_models["base"]), adapter=str(adapter), dtype="float32")
    found = measured(load_causal("tuned", config, ["block1"]))
    adapted = PeftModel.from_pretrained(whole(tiny_models["base"]), str(adapter)).eval()
    assert found == pytest.approx(by_hand(adapted), rel=1e-5)
    assert found != pytest.approx(by_hand(whole(tiny_models["base"])), rel=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
def test_a_change_sees_the_activations_of_extraction_and_ends_with_the_call(family, tmp_path):
    folder = save_family(family, tmp_path)
    config = ModelConfig(str(folder), dtype="bfloat16")
    model, seen = load_causal("base", config, ["block0", "block2"]), {}
    ids_BN, mask_BN = padded([ids.numpy() for ids in DOCUMENTS])

    def halve(acts_BND):
        seen["block2"] = acts_BND
        return acts_BND / 2

    plain = model.hidden_states(ids_BN, mask_BN, {})
    changed = model.hidden_states(ids_BN, mask_BN, {"block2": halve})
    cut = load_blocks("base", config, ["block0", "block2"])
    assert torch.equal(seen["block2"], cut.activations(ids_BN, mask_BN)["block2"])
    assert not torch.allclose(changed, plain, atol=1e-2)
    assert torch.equal(model.hidden_states(ids_BN, mask_BN, {}), plain)


def test_a_model_without_a_head_is_refused(tmp_path):
    transformers.LlamaModel(transformers.LlamaConfig(**COMMON)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"models.base: the files of .* lack lm_head.weight"):
        load_causal("base", ModelConfig(str(tmp_path)), ["block1"])


def test_a_missing_model_is_named():
    with pytest.raises(BadInput, match=r"models.tuned.id=/nowhere/model is not a folder"):
        load_causal("tuned", ModelConfig("/nowhere/model"), ["block1"])
