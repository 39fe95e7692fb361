"""Cross-checks of the settings and the names of runs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from planted import settings_of

from extract.command import compose, experiment_of
from extract.config import KeptConfig
from extract.errors import BadInput
from train.config import CrosscoderConfig, DataConfig, TrainingConfig, TrainSettings
from train.runs import run_folder, run_name, selected_pair

WRONG = [
    ("crosscoder.k", 33, "k=33 exceeds crosscoder.num_latents=32"),
    ("crosscoder.k", 0, "crosscoder.k=0 must be greater than 0"),
    ("crosscoder.dedicated", 0.6, "more latents than there are. Give at most 0.5"),
    ("crosscoder.dedicated", 0.01, "less than one latent"),
    ("crosscoder.code_normalization", "crosscode", "Did you mean crosscoder"),
    ("crosscoder.loss", "square", "Did you mean squared"),
    ("crosscoder.init", "sam", "Did you mean same"),
    ("crosscoder.activation_scaling", "mean", "Did you mean mean_variance"),
    ("crosscoder.threshold_decay", 1.0, "threshold_decay=1.0"),
    ("crosscoder.threshold_start_step", 24, "threshold_start_step=24 is never reached in a run of 24 steps"),
    ("crosscoder.auxk_alpha", -1.0, "auxk_alpha=-1.0 must not be negative"),
    ("training.step", "dense", "training.step=dense is not one of readable, sparse"),
    ("training.warmup_steps", 24, "warmup_steps=24 is no shorter than the run of 24 steps"),
    ("training.decay_fraction", 1.5, "decay_fraction=1.5"),
    ("training.adam_betas", [0.9], "two numbers"),
    ("training.lr", 0.0, "training.lr=0.0"),
    ("training.max_grad_norm", float("nan"), "max_grad_norm=nan"),
    ("data.heldout_fraction", 1.0, "heldout_fraction=1.0"),
    ("training.num_micro_steps", 0, "training.num_micro_steps=0 must be greater than 0"),
    (
        "training.num_micro_steps",
        5,
        "num_tokens_per_step=32 must be a multiple of num_micro_steps=5. Nearest: 30 or 35",
    ),
    ("training.num_micro_steps", 33, "must be a multiple of num_micro_steps=33. Nearest: 33"),
    ("training.keep_every", -1, "training.keep_every=-1 must not be negative"),
    ("engine.name", "singel", "Did you mean single"),
    ("engine.timeout_s", 0, "engine.timeout_s=0 must be greater than 0"),
    ("engine.zero_stage", 4, "engine.zero_stage=4 is not one of 1, 2, 3"),
    ("engine.ranks_per_copy", 2, "ranks_per_copy=2 with engine=single, which runs in one process. Leave it out"),
    ("engine.zero_stage", 3, "engine.zero_stage=3 is a setting of DeepSpeed, and engine=single does not use it"),
    ("engine.offload_optimizer", True, "engine.offload_optimizer=True is a setting of DeepSpeed"),
    ("engine.deepspeed_json", "a.json", "engine.deepspeed_json=a.json is a setting of DeepSpeed"),
    ("tracking.mode", "off", "tracking.mode=off is not one of"),
    ("seed", -1, "seed=-1"),
]


def change(settings: TrainSettings, name: str, value: object) -> TrainSettings:
    settings = deepcopy(settings)
    *sections, leaf = name.split(".")
    owner = settings
    for section in sections:
        owner = getattr(owner, section)
    setattr(owner, leaf, value)
    return settings


def test_the_defaults_are_those_of_the_method():
    """arXiv 2504.02922 and 2412.06410: norms not squared, exact norms of the two decoders, the published clocks."""
    crosscoder, training = CrosscoderConfig(), TrainingConfig()
    assert (crosscoder.code_normalization, crosscoder.loss, crosscoder.init) == ("crosscoder", "norm", "same")
    assert (crosscoder.auxk_alpha, crosscoder.dead_after_tokens) == (1 / 32, 10_000_000)
    assert (crosscoder.threshold_start_step, crosscoder.threshold_decay) == (1000, 0.999)
    assert (crosscoder.dedicated, crosscoder.delta_weight, crosscoder.activation_scaling) == (0, 0, "norm")
    assert (training.num_tokens_per_step, training.lr, training.adam_betas) == (2048, 1e-4, [0.9, 0.999])
    assert (training.warmup_steps, training.decay_fraction, training.max_grad_norm) == (1000, 0, 1.0)
    assert DataConfig().heldout_fraction == 0.05
    assert (KeptConfig().skip_first_tokens, KeptConfig().max_norm_ratio) == (1, 10)


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_settings_are_refused_by_name(tmp_path, name, value, message):
    with pytest.raises(BadInput) as error:
        change(settings_of(tmp_path), name, value).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("fsdp", "ranks_per_copy", 0, "engine.ranks_per_copy=0 must be greater than 0"),
        ("deepspeed", "ranks_per_copy", 2, "with engine=deepspeed, which divides over all ranks"),
        ("fsdp", "zero_stage", 1, "Leave it out, or choose engine=deepspeed"),
        ("latent", "offload_optimizer", True, "engine=latent does not use it"),
    ],
)
def test_settings_of_other_engines_are_refused(tmp_path, name, setting, value, message):
    settings = change(settings_of(tmp_path), "engine.name", name)
    settings.check()
    with pytest.raises(BadInput, match=message):
        change(settings, f"engine.{setting}", value).check()


def test_engines_take_the_settings_that_they_know(tmp_path):
    own = tmp_path / "own.json"
    own.write_text("{}")
    known = {
        "fsdp": {"ranks_per_copy": 2},
        "latent": {"ranks_per_copy": 4},
        "deepspeed": {"zero_stage": 3, "offload_optimizer": True, "deepspeed_json": str(own)},
    }
    for name, values in known.items():
        settings = change(settings_of(tmp_path), "engine.name", name)
        for setting, value in values.items():
            settings = change(settings, f"engine.{setting}", value)
        settings.check()
    own.write_text('{"gradient_clipping": 1.0}')
    with pytest.raises(BadInput, match="training.max_grad_norm"):
        settings.check()


def test_who_computes_a_step_and_in_how_many_parts_does_not_name_a_run(tmp_path):
    experiment = settings_of(tmp_path)
    settings = change(experiment, "engine.name", "latent")
    for name, value in (("training.num_micro_steps", 4), ("training.keep_every", 100), ("engine.ranks_per_copy", 2)):
        settings = change(settings, name, value)
    assert run_name(settings, experiment) == run_name(experiment, experiment)


def test_dedicated_shares_are_checked_against_the_number_of_models(tmp_path):
    settings = change(settings_of(tmp_path), "pairs", {"base_tuned": ["base", "tuned", "third"]})
    settings.models["third"] = settings.models["base"]
    with pytest.raises(BadInput, match="each of 3 models"):
        change(settings, "crosscoder.dedicated", 0.4).check()


def test_steps_are_rounded_up(tmp_path):
    assert change(settings_of(tmp_path), "training.num_tokens", 32 * 24 + 1).training.num_steps == 25


def test_run_name_lists_what_differs_from_the_experiment_and_matters(tmp_path):
    experiment = settings_of(tmp_path)
    assert run_name(experiment, experiment) == "base_tuned"
    settings = change(change(change(experiment, "training.lr", 1e-3), "crosscoder.k", 5), "hookpoint", "block9")
    settings = change(change(settings, "training.device", "cuda"), "training.log_every", 3)
    settings = change(change(settings, "tracking.project", "other"), "training.adam_betas", [0.8, 0.99])
    expected = "base_tuned,adam_betas=[0.8,0.99],hookpoint=block9,k=5,lr=0.001"
    assert run_name(settings, experiment) == expected
    assert run_folder(settings, experiment) == tmp_path / "runs" / expected


def test_the_calibration_names_a_run_only_where_there_is_one(tmp_path):
    experiment = settings_of(tmp_path)
    stored = change(experiment, "data.calibration_tokens", 5)
    assert run_name(stored, experiment) == "base_tuned"
    assert run_name(change(stored, "data.mode", "online"), experiment) == "base_tuned,calibration_tokens=5,mode=online"


def test_a_setting_whose_name_two_sections_share_is_named_in_full(tmp_path, monkeypatch):
    experiment = settings_of(tmp_path)
    settings = change(experiment, "crosscoder.k", 5)
    with_namesake = {"crosscoder.k": 3, "data.k": 1, "training.lr": 0.1}
    monkeypatch.setattr("train.runs.result_settings", lambda s: with_namesake | {"crosscoder.k": s.crosscoder.k})
    assert run_name(settings, experiment) == "base_tuned,crosscoder.k=5"


def test_models_and_text_are_the_identity_of_the_study_and_not_part_of_a_name(tmp_path):
    command = ["experiment=pair", "models.base=a/b", "models.tuned=c/d", "corpus=text.jsonl", "study=mine"]
    settings = compose(TrainSettings, command)
    assert run_folder(settings, experiment_of(settings)) == Path("outputs/mine/runs/base_tuned")
    size = ["crosscoder.num_latents=16384", "crosscoder.k=50", "crosscoder.dedicated=0.05", "training.lr=1e-3"]
    size += ["training.num_tokens=20_000_000", "training.num_tokens_per_step=4096", "data.heldout_fraction=0.1"]
    settings = compose(TrainSettings, [*command, *size])
    assert run_name(settings, experiment_of(settings)) == (
        "base_tuned,dedicated=0.05,heldout_fraction=0.1,k=50,lr=0.001,num_latents=16384,num_tokens=20000000,"
        "num_tokens_per_step=4096"
    )


def test_long_names_are_cut_and_stay_apart(tmp_path):
    experiment = change(settings_of(tmp_path), "pair", "p" * 150)
    names = {run_name(change(change(experiment, "seed", 7), "crosscoder.k", k), experiment) for k in (4, 5)}
    assert len(names) == 2 and all(len(name) == 160 and name.startswith("p" * 147 + ",") for name in names)


def test_nearby_floats_have_different_names(tmp_path):
    experiment = settings_of(tmp_path)
    names = {run_name(change(experiment, "training.lr", lr), experiment) for lr in (1e-3, 0.001 + 1e-12, 1.0000001e-3)}
    assert len(names) == 3


def test_without_a_selected_pair_the_choices_are_listed(tmp_path):
    settings = change(settings_of(tmp_path), "pair", None)
    assert selected_pair(settings) == "base_tuned"
    settings.pairs["tuned_base"] = ["tuned", "base"]
    with pytest.raises(BadInput, match="experiment=planted/base_tuned, experiment=planted/tuned_base"):
        selected_pair(settings)
