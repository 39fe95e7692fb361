"""The crosscoder's maths, initial weights, and what it writes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.optimize import minimize

from extract.errors import BadInput
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.initialisation import geometric_median, initialise


def random_crosscoder(num_models=2, d_model=4, num_latents=12, **config):
    generator = torch.Generator().manual_seed(0)
    models = ["base", "tuned", "third"][:num_models]
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=num_latents, k=2, **config), models, d_model, "block7")
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        crosscoder.activation_mean.copy_(torch.randn(num_models, d_model, generator=generator))
        crosscoder.activation_scale.copy_(torch.rand(num_models, generator=generator) + 0.5)
    return crosscoder


def test_encode_and_decode_equal_loops():
    crosscoder = random_crosscoder()
    crosscoder.threshold = 1.5
    x_BMD = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))
    acts_BL = crosscoder.encode(x_BMD).tolist()
    recons_BMD = crosscoder.decode(crosscoder.encode(x_BMD)).tolist()
    enc, dec = (w.detach().view(-1, 2, 4).tolist() for w in (crosscoder.W_enc, crosscoder.W_dec))
    mean, scale = crosscoder.activation_mean.tolist(), crosscoder.activation_scale.tolist()
    b_enc, b_dec = crosscoder.b_enc.tolist(), crosscoder.b_dec.detach().view(2, 4).tolist()
    inactive = 0
    for t in range(5):
        scaled = [[(x_BMD[t, m, d].item() - mean[m][d]) * scale[m] for d in range(4)] for m in range(2)]
        for j in range(12):
            pre = max(0.0, b_enc[j] + sum(scaled[m][d] * enc[j][m][d] for m in range(2) for d in range(4)))
            s = sum(math.sqrt(sum(v * v for v in dec[j][m])) for m in range(2))
            inactive += 0 < pre * s <= 1.5
            assert acts_BL[t][j] == pytest.approx(pre if pre * s > 1.5 else 0.0, rel=1e-5, abs=1e-6)
        for m in range(2):
            for d in range(4):
                recons = b_dec[m][d] + sum(acts_BL[t][j] * dec[j][m][d] for j in range(12))
                assert recons_BMD[t][m][d] == pytest.approx(recons / scale[m] + mean[m][d], rel=1e-4, abs=1e-5)
    assert inactive > 0  # the threshold did cut positive codes


def test_a_code_at_the_threshold_is_inactive():
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=1, k=1, code_normalization="none"), ["base"], 1, "block0")
    with torch.no_grad():
        crosscoder.W_enc.fill_(1.0)
    crosscoder.threshold = 2.0
    assert crosscoder.encode(torch.tensor([[[2.0]], [[2.5]]])).tolist() == [[0.0], [2.5]]


def test_encode_without_a_threshold_is_refused():
    with pytest.raises(BadInput, match="threshold"):
        random_crosscoder().encode(torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("kind", "expected"), [("crosscoder", 5.0 + 13.0), ("sae", math.sqrt(25.0 + 169.0)), ("none", 1.0)]
)
def test_latent_scale(kind, expected):
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=1, k=1, code_normalization=kind), ["a", "b"], 2, "block0")
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.tensor([[3.0, 4.0, 5.0, 12.0]]))
    assert crosscoder.latent_scale().item() == pytest.approx(expected)


@pytest.mark.parametrize("init", ["same", "random", "data"])
@pytest.mark.parametrize("num_latents", [12, 50])
def test_initial_weights(init, num_latents):
    crosscoder = random_crosscoder(num_latents=num_latents, init=init)
    x_BMD = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(2)) + 3
    initialise(crosscoder, x_BMD, seed=0)
    rows = crosscoder.W_enc.detach().view(num_latents, 2, 4)
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(num_latents, 2))
    assert torch.equal(crosscoder.W_enc, crosscoder.W_dec)
    assert crosscoder.W_enc.data_ptr() != crosscoder.W_dec.data_ptr()
    assert crosscoder.b_enc.count_nonzero() == 0
    assert torch.equal(rows[:, 0], rows[:, 1]) == (init == "same")
    assert len(rows[:, 0].unique(dim=0)) == num_latents
    if init == "data":
        centred = torch.nn.functional.normalize(x_BMD - x_BMD.mean(0), dim=2)
        distance = torch.cdist(rows[:20].flatten(1), centred.flatten(1)).min(1).values
        assert distance.max() < 1e-6
        assert len(rows[:20].flatten(1).unique(dim=0)) == min(20, num_latents)


def test_repeated_tokens_get_noise_of_their_own_norm():
    """A row x plus noise of norm ||x|| in a random direction of a wide space has cosine 1 / sqrt(2) with x."""
    generator = torch.Generator().manual_seed(0)
    crosscoder = random_crosscoder(d_model=2000, num_latents=60, init="data")
    x_BMD = torch.randn(10, 2, 2000, generator=generator) * torch.tensor([1.0, 7.0])[:, None]
    initialise(crosscoder, x_BMD, seed=0)
    rows = crosscoder.W_enc.detach().view(60, 2, 2000)
    for repeat in range(1, 6):
        cosine = (rows[:10] * rows[10 * repeat : 10 * repeat + 10]).sum(2)
        torch.testing.assert_close(cosine, torch.full((10, 2), 0.5**0.5), rtol=0, atol=0.05)


def test_initial_weights_depend_on_the_seed_alone():
    first, second, other = (random_crosscoder() for _ in range(3))
    x_BMD = torch.randn(20, 2, 4)
    for crosscoder, seed in ((first, 1), (second, 1), (other, 2)):
        torch.rand(seed)  # the global generator plays no part
        initialise(crosscoder, x_BMD, seed)
    assert torch.equal(first.W_enc, second.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_geometric_median_minimises_the_sum_of_distances():
    x_BD = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    best = minimize(lambda y: (x_BD - torch.tensor(y)).norm(dim=1).sum().item(), x_BD.mean(0).numpy(), tol=1e-12)
    torch.testing.assert_close(geometric_median(x_BD), torch.tensor(best.x), rtol=0, atol=1e-5)


def test_geometric_median_of_a_majority_is_the_majority():
    x_BD = torch.tensor([[1.0, 2.0]] * 3 + [[50.0, 7.0], [-3.0, 9.0]])
    torch.testing.assert_close(geometric_median(x_BD), torch.tensor([1.0, 2.0]).double(), rtol=0, atol=1e-6)


def test_the_decoder_bias_is_each_models_median():
    crosscoder = random_crosscoder()
    x_BMD = torch.randn(15, 2, 4) * torch.tensor([1.0, 5.0])[:, None]
    initialise(crosscoder, x_BMD, seed=0)
    for m in range(2):
        torch.testing.assert_close(crosscoder.b_dec.detach().view(2, 4)[m], geometric_median(x_BMD[:, m]).float())


def test_dedicated_latents_have_rows_of_their_owner_alone():
    crosscoder = random_crosscoder(num_latents=20, dedicated=0.15)
    initialise(crosscoder, torch.randn(30, 2, 4), seed=0)
    assert crosscoder.dedicated_owner.dtype == torch.int8
    assert crosscoder.dedicated_owner.tolist() == [0] * 3 + [1] * 3 + [-1] * 14
    for weight in (crosscoder.W_enc, crosscoder.W_dec):
        norms = weight.detach().view(20, 2, 4).norm(dim=2)
        expected = torch.ones(20, 2)
        expected[:3, 1] = expected[3:6, 0] = 0
        torch.testing.assert_close(norms, expected)
    assert crosscoder.latent_scale()[:7].tolist() == pytest.approx([1.0] * 6 + [2.0])


def part_of(whole, latents):
    part = Crosscoder(whole.config, whole.models, whole.d_model, whole.hookpoint, latents)
    rows = slice(latents.start, latents.stop)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(part, name).copy_(getattr(whole, name)[rows])
    return part


@pytest.mark.parametrize("kind", ["crosscoder", "sae", "none"])
def test_parts_together_compute_what_the_whole_does(kind):
    """Codes side by side are those of the whole; reconstructions add up to it, the bias coming from none of them."""
    whole = random_crosscoder(num_models=3, num_latents=20, dedicated=0.1, code_normalization=kind)
    whole.zero_foreign_rows(whole.W_enc, whole.W_dec)
    parts = [part_of(whole, latents) for latents in (range(5), range(5, 6), range(6, 20))]
    assert [part.num_latents for part in parts] == [5, 1, 14]
    x_BMD = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1))
    for name in ("pre_activations", "latent_scale", "foreign_rows"):
        arguments, dim = ((x_BMD,), 1) if name == "pre_activations" else ((), 0)
        together = torch.cat([getattr(part, name)(*arguments) for part in parts], dim)
        torch.testing.assert_close(together, getattr(whole, name)(*arguments))
    assert torch.equal(torch.cat([part.dedicated_owner for part in parts]), whole.dedicated_owner)
    acts_BL = whole.pre_activations(x_BMD)
    partial = [part.reconstruct(acts_BC) for part, acts_BC in zip(parts, acts_BL.split([5, 1, 14], 1), strict=True)]
    torch.testing.assert_close(sum(partial) + whole.b_dec.view(3, 4), whole.reconstruct(acts_BL))


def test_a_part_zeroes_its_own_foreign_rows():
    """Of 20 latents 0 and 1 belong to the first model, 2 and 3 to the second; the part has latents 1 to 4."""
    part = Crosscoder(CrosscoderConfig(num_latents=20, k=2, dedicated=0.1), ["a", "b"], 3, "block0", range(1, 5))
    weight_LW = torch.ones(4, 6)
    part.zero_foreign_rows(weight_LW)
    assert weight_LW.view(4, 2, 3)[:, :, 0].tolist() == [[1, 0], [0, 1], [0, 1], [1, 1]]


def test_a_part_is_not_saved(tmp_path):
    with pytest.raises(AssertionError, match="A part of a crosscoder"):
        part_of(random_crosscoder(), range(3)).save(tmp_path / "crosscoder")
    assert not list(tmp_path.iterdir())


def test_what_is_loaded_equals_what_was_saved(tmp_path):
    crosscoder = random_crosscoder(dedicated=0.25, loss="squared")
    crosscoder.threshold = 0.1 + 0.2
    crosscoder.save(tmp_path / "crosscoder")
    loaded = Crosscoder.load(tmp_path / "crosscoder")
    assert loaded.state_dict().keys() == crosscoder.state_dict().keys()
    for name, tensor in crosscoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    for name in ("config", "models", "hookpoint", "d_model", "threshold"):
        assert getattr(loaded, name) == getattr(crosscoder, name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "crosscoder", "crosscoder.safetensors"]


def test_saving_again_replaces(tmp_path):
    crosscoder = random_crosscoder()
    crosscoder.save(tmp_path / "crosscoder")
    crosscoder.threshold = 4.0
    crosscoder.save(tmp_path / "crosscoder")
    assert Crosscoder.load(tmp_path / "crosscoder").threshold == 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["crosscoder"]


def test_missing_foreign_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(BadInput, match="nowhere holds no crosscoder"):
        Crosscoder.load(tmp_path / "nowhere")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(BadInput, match="foreign.*does not describe a crosscoder"):
        Crosscoder.load(foreign)
    random_crosscoder().save(tmp_path / "cut")
    weights = tmp_path / "cut" / "crosscoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BadInput, match="crosscoder.safetensors is missing or damaged"):
        Crosscoder.load(tmp_path / "cut")
