"""Loss recovered: planted crosscoders with known answers, an independent forward pass, ranks, and use in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pool import pool_of
from small_runs import OUTLIERS, settings_of

from extract.activations import extract
from extract.errors import BadInput
from extract.tokens import make_tokens
from tests import tiny
from tests.extract.test_models import save_family
from train.config import CrosscoderConfig, TrainSettings
from train.crosscoder import Crosscoder
from train.data import ActivationPairs, heldout_batches
from train.encoder import Operands
from train.engine import Engine
from train.metrics import reconstructions
from train.recovered import HeldoutDocuments, LossRecovered, heldout_documents
from train.stream import BatchStream
from train.trainer import train
from train.world import World

KINDS = ("clean", "reconstructed", "zero")
MEASURED = ("val/cross_entropy/", "val/loss_recovered/")


@pytest.fixture
def gemma(study, tmp_path) -> list[str]:
    """The study with two random Gemma-2 models in float32."""
    for seed, name in enumerate(("base", "tuned")):
        save_family("gemma2", tmp_path / name, seed)
    return [*study, *(f"models.{name}={tmp_path / name}" for name in ("base", "tuned")), *float32("base", "tuned")]


def float32(*models: str) -> list[str]:
    return [f"models.{model}.dtype=float32" for model in models]


def opened(study: list[str], *overrides: str) -> tuple[TrainSettings, ActivationPairs]:
    """The settings, and the data that they extract."""
    settings = settings_of(study, *overrides)
    make_tokens(settings)
    extract(settings)
    return settings, ActivationPairs.open(settings)


def column(values: dict[str, float], members: list[str], kind: str) -> list[float]:
    return [values[f"val/cross_entropy/{member}/{kind}"] for member in members]


def recovered(values: dict[str, float], members: list[str]) -> list[float]:
    return [values[f"val/loss_recovered/{member}"] for member in members]


def planted_crosscoder(data: ActivationPairs, scale: float, num_latents: int | None = None) -> Crosscoder:
    """x = ReLU(x) - ReLU(-x): two latents for every dimension, with the scaling of the data, rebuild `scale` * x."""
    width = data.num_models * data.d_model
    config = CrosscoderConfig(num_latents=num_latents or 2 * width, k=1)
    crosscoder = Crosscoder(config, data.models, data.d_model, "block1")
    directions_LW = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        crosscoder.W_enc[: 2 * width], crosscoder.W_dec[: 2 * width] = directions_LW, scale * directions_LW
    crosscoder.activation_scale.copy_(data.activation_scale)
    crosscoder.threshold = 0.0
    return crosscoder


def reconstruct_by(crosscoder: Crosscoder):
    operands = Operands.of(crosscoder)
    return lambda x_TMD: reconstructions(crosscoder, x_TMD, operands)


def test_what_replaces_nothing_recovers_everything_and_zeros_recover_nothing(gemma):
    settings, data = opened(gemma, *OUTLIERS)
    loss, members = LossRecovered(settings, data, 150), data.models
    same, none = loss.measure(lambda x_TMD: x_TMD), loss.measure(torch.zeros_like)
    assert column(same, members, "reconstructed") == column(same, members, "clean")
    assert recovered(same, members) == [1.0, 1.0] and recovered(none, members) == [0.0, 0.0]
    assert column(none, members, "reconstructed") == column(none, members, "zero")
    for kind in ("clean", "zero"):
        assert column(none, members, kind) == column(same, members, kind)
    assert loss.documents.num_replaced == 150
    other = LossRecovered(settings, data, 150).measure(lambda x_TMD: 2 * x_TMD)  # zero is worse, or better, than clean
    for member in members:
        clean, recons, zero = (other[f"val/cross_entropy/{member}/{kind}"] for kind in KINDS)
        assert other[f"val/loss_recovered/{member}"] == pytest.approx((zero - recons) / (zero - clean), rel=1e-9)


def test_a_planted_identity_recovers_all_and_an_empty_crosscoder_is_the_ablation(study):
    settings, data = opened([*study, *float32("base", "tuned")])
    loss, members = LossRecovered(settings, data, 200), data.models
    whole = loss.measure(reconstruct_by(planted_crosscoder(data, 1.0)))
    assert recovered(whole, members) == pytest.approx([1, 1], abs=1e-4)
    empty = loss.measure(reconstruct_by(planted_crosscoder(data, 0.0)))
    assert column(empty, members, "reconstructed") == column(empty, members, "zero")


@torch.no_grad()
def by_hand(
    settings: TrainSettings, data: ActivationPairs, crosscoder: Crosscoder, num_tokens: int
) -> dict[str, float]:
    """Each document alone, with a forward hook on the whole model: kept positions get the dense crosscoder's values."""
    models = {place.model: _whole(settings, place.model) for place in map(settings.place, data.models)}
    sums, num_predicted, left = np.zeros((len(data.models), 3)), 0, num_tokens
    for i in sorted(np.flatnonzero(data.is_heldout), key=data.content.__getitem__):
        ids_N = torch.from_numpy(data.tokens.document(i).token_ids.astype(np.int64))
        kept_T = np.flatnonzero(data.kept.mask[data.tokens.row_starts[i] : data.tokens.row_starts[i + 1]])[:left]
        left -= len(kept_T)
        ids_N = ids_N if left else ids_N[: kept_T[-1] + 1]
        places = [settings.place(member) for member in data.models]
        states = {name: model(ids_N[None], output_hidden_states=True).hidden_states for name, model in models.items()}
        block = [int(place.hookpoint.removeprefix("block")) for place in places]
        x_NMD = torch.stack([states[place.model][b + 1][0] for place, b in zip(places, block, strict=True)], dim=1)
        recons_TMD = crosscoder.decode(crosscoder.encode(x_NMD[kept_T]))
        for m, place in enumerate(places):
            for column, values_TD in enumerate((x_NMD[kept_T, m], recons_TMD[:, m], 0 * recons_TMD[:, m])):

                def hook(module, inputs, output, values_TD=values_TD, kept_T=kept_T):
                    acts = output[0] if isinstance(output, tuple) else output
                    acts[0, kept_T] = values_TD
                    return output

                handle = models[place.model].model.layers[block[m]].register_forward_hook(hook)
                log_p_NV = models[place.model](ids_N[None]).logits[0].double().log_softmax(1)
                handle.remove()
                sums[m, column] -= log_p_NV[:-1].gather(1, ids_N[1:, None]).sum().item()
        num_predicted += len(ids_N) - 1
        if not left:
            break
    values = {}
    for m, member in enumerate(data.models):
        clean, recons, zero = means = sums[m] / num_predicted
        values |= {f"val/cross_entropy/{member}/{kind}": mean for kind, mean in zip(KINDS, means, strict=True)}
        values[f"val/loss_recovered/{member}"] = (zero - recons) / (zero - clean)
    return values


def _whole(settings: TrainSettings, name: str) -> torch.nn.Module:
    config = settings.models[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(config.id, attn_implementation="eager").float()
    if config.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, config.adapter).merge_and_unload()
    return model.eval()


@pytest.mark.parametrize("members", [["base", "tuned"], ["base@block0", "tuned", "base@block2", "tuned@block0"]])
def test_a_hand_written_forward_pass_agrees(gemma, tmp_path, members):
    """Two random Gemma-2; and one of them with an adapter of itself, both at two places. Outliers are there, and one
    more token is skipped.
    """
    adapter = tiny.save_adapter(tmp_path / "base", tmp_path / "adapter")
    adapted = [f"models.tuned={tmp_path / 'base'}", f"models.tuned.adapter={adapter}"] if len(members) > 2 else []
    overrides = [*adapted, *OUTLIERS, "kept.skip_first_tokens=2", f"pairs.base_tuned=[{','.join(members)}]"]
    settings, data = opened(gemma, *overrides)
    assert not data.kept.mask[data.tokens.row_starts[:-1] + 1].any() and data.share_dropped > 0.05
    crosscoder = planted_crosscoder(data, 0.9)
    crosscoder.threshold = 0.3 * 0.9  # small values, of scaled activations, are lost
    torch.nn.init.normal_(crosscoder.b_dec, std=0.1, generator=torch.Generator().manual_seed(0))
    found = LossRecovered(settings, data, 170).measure(reconstruct_by(crosscoder))
    assert found == pytest.approx(by_hand(settings, data, crosscoder, 170), rel=2e-4)
    assert len(set(found.values())) >= 3 * len(members)


def test_computed_activations_give_the_same_as_stored_ones(study, online):
    settings, stored = opened([*study, *float32("base", "tuned")], "kept.max_norm_ratio=1.25")
    values = [
        LossRecovered(settings, data, 150).measure(lambda x_TMD: 0.8 * x_TMD) for data in (stored, online(settings))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_documents_end_with_the_last_token_that_is_wanted(study):
    settings, data = opened(study)
    found = heldout_documents(data, 40)
    order = sorted(np.flatnonzero(data.is_heldout), key=data.content.__getitem__)
    assert [len(ids) for ids in found.token_ids[:-1]] == data.tokens.lengths[order[: len(found.token_ids) - 1]].tolist()
    assert found.num_replaced == 40 and found.is_kept[-1][-1] and not any(kept[0] for kept in found.is_kept)
    assert found.num_predicted == sum(len(ids) - 1 for ids in found.token_ids)
    settings.data.max_validation_tokens = 30
    assert LossRecovered(settings, data, 40).documents.num_replaced == 30
    everything = heldout_documents(data, 10**9)
    assert len(everything.token_ids) == data.is_heldout.sum()


def test_where_zeros_change_no_prediction_nothing_can_be_recovered(study):
    settings, data = opened(study)
    loss = LossRecovered(settings, data, 100)
    loss._documents = HeldoutDocuments([np.arange(1, 6)], [np.array([False] * 4 + [True])])  # nothing comes after it
    assert all(np.isnan(value) for value in recovered(loss.measure(torch.zeros_like), data.models))


def evaluated(world: World, overrides: list[str], engine: str) -> list[dict[str, float]]:
    """What a rank reports after some steps on the store that is there."""
    settings = settings_of(overrides, f"engine={engine}", "data.num_lanes=4")
    data = ActivationPairs.open(settings)
    loss = LossRecovered(settings, data, 150)
    model = Engine(settings, data.models, data.d_model, data.activation_mean, data.activation_scale, world)
    rank, size, batch = world.everyone.rank, world.everyone.size, settings.training.num_tokens_per_step
    stream = BatchStream(data, settings.seed, batch, settings.data, rank, size)
    model.initialise(stream.batch(0), torch.from_numpy(stream.numbers(0)))
    readers, found = model.share.tokens, []
    for step in range(7):
        model.step(stream.batch(step), token_b=torch.from_numpy(stream.numbers(step)))
        if step in (0, 6):  # without a threshold, and with one
            found.append(model.evaluate(heldout_batches(data, batch, None, readers.rank, readers.size), loss.measure))
    return [{name: value for name, value in values.items() if name.startswith(MEASURED)} for values in found]


@pytest.mark.parametrize("engine", ["fsdp", "latent"])
def test_two_ranks_divide_the_documents_and_find_what_one_finds(study, engine):
    """With batches so small that one rank has one more than the other."""
    overrides = [*study, *float32("base", "tuned"), "activations.batch_tokens=64"]
    settings, data = opened(overrides)
    assert len(LossRecovered(settings, data, 150).documents.batches(64)) % 2 == 1
    ranks = pool_of(2).run(evaluated, overrides, engine)
    alone = evaluated(World.alone(), overrides, "single")
    assert ranks[0] == ranks[1] and alone[0] == {} and len(alone[1]) == 8
    assert ranks[0] == [{}, pytest.approx(alone[1], rel=1e-4)]


def test_training_measures_it_with_every_validation_and_trains_as_without(study, tmp_path):
    settings, data = opened(study)
    plain = train(settings, tmp_path / "plain")
    measuring = settings_of(study, "training.recovered_tokens=100")
    folder = train(measuring, tmp_path / "measuring")
    weights = [Crosscoder.load(place).state_dict() for place in (plain, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [json.loads(line) for line in (tmp_path / "measuring" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss_recovered/base" in line] == [20, 40, 50]
    values = {name: value for name, value in lines[-1].items() if name.startswith(MEASURED)}
    expected = LossRecovered(measuring, data, 100).measure(reconstruct_by(Crosscoder.load(folder)))
    assert values == pytest.approx(expected, rel=1e-6)


def test_another_model_than_was_extracted_is_refused(study, tmp_path):
    settings, data = opened(study)
    tiny.save_model(tmp_path / "other", seed=7)
    settings.models["tuned"].id = str(tmp_path / "other")
    with pytest.raises(BadInput, match="models.tuned is not the model whose activations .*: it differs in weights"):
        LossRecovered(settings, data, 100)
    settings.models["tuned"].id = str(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"models.tuned.id=.*gone is not a folder"):
        train(settings_of(study, "training.recovered_tokens=9", f"models.tuned={tmp_path / 'gone'}"), tmp_path / "run")
    assert not Path(tmp_path / "run" / "metrics.jsonl").exists()


def test_without_held_out_documents_it_is_refused(study):
    with pytest.raises(BadInput, match="training.recovered_tokens=9 are held-out tokens, and data.heldout_fraction=0"):
        settings_of(study, "training.recovered_tokens=9", "data.heldout_fraction=0")
