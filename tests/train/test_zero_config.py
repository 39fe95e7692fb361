from __future__ import annotations

import json

import pytest

from extract.errors import BadInput
from train.zero_config import OPTIONS, deepspeed_config


def composed(tmp_path, user, stage=2, offload_optimizer=False):
    path = tmp_path / "user.json"
    path.write_text(user if isinstance(user, str) else json.dumps(user))
    return deepspeed_config(stage, offload_optimizer, str(path))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_settings_alone(stage, offload):
    config = deepspeed_config(stage, offload, None)
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"].get("offload_optimizer") == ({"device": "cpu"} if offload else None)
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default is not none
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & config.keys()


def test_a_file_is_merged_into_the_settings(tmp_path):
    user = {"steps_per_print": 7, "zero_optimization": {"stage": 2, "overlap_comm": True, "allgather_bucket_size": 99}}
    expected = deepspeed_config(2, False, None)
    expected["steps_per_print"] = 7
    expected["zero_optimization"] |= {"overlap_comm": True, "allgather_bucket_size": 99}
    assert composed(tmp_path, user) == expected


def test_a_file_made_for_another_trainer_may_leave_things_open(tmp_path):
    user = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "fp16": {"enabled": False, "loss_scale": 0},
        "bf16": {"enabled": False},
        "tensorboard": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": "auto",
            "offload_optimizer": {"device": "none"},
            "reduce_bucket_size": "auto",
            "sub_group_size": "auto",
        },
    }
    assert composed(tmp_path, user) == deepspeed_config(2, False, None)


def test_details_of_the_offload(tmp_path):
    user = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    zero = composed(tmp_path, user, offload_optimizer=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    with pytest.raises(BadInput, match=r"offload_optimizer.*engine\.offload_optimizer"):
        composed(tmp_path, user)
    user["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    with pytest.raises(BadInput, match="nvme"):
        composed(tmp_path, user, offload_optimizer=True)


@pytest.mark.parametrize(
    ("user", "key", "setting"),
    [
        ({"train_batch_size": 64}, "train_batch_size", "training.num_tokens_per_step"),
        ({"train_micro_batch_size_per_gpu": 64}, "train_micro_batch_size_per_gpu", "training.num_tokens_per_step"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "training.num_micro_steps"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "training.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "training.warmup_steps"),
        ({"gradient_clipping": 0.5}, "gradient_clipping", "training.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16", "training.precision"),
        ({"fp16": {}}, "fp16", "training.precision"),
        ({"communication_data_type": "bf16"}, "communication_data_type", "float32"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "engine.zero_stage"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage", "engine.zero_stage"),
    ],
)
def test_what_crossdiff_decides_is_refused_with_the_setting_to_use(tmp_path, user, key, setting):
    with pytest.raises(BadInput) as error:
        composed(tmp_path, user)
    assert f"user.json: {key} " in str(error.value) and setting in str(error.value)


@pytest.mark.parametrize(
    ("stage", "option", "remedy"),
    [
        (3, {"allgather_bucket_size": 1000}, "engine.zero_stage=1 or engine.zero_stage=2"),
        (3, {"use_multi_rank_bucket_allreduce": True}, "engine.zero_stage=1 or engine.zero_stage=2"),
    ],
)
def test_options_that_a_stage_lacks(tmp_path, stage, option, remedy):
    with pytest.raises(BadInput) as error:
        composed(tmp_path, {"zero_optimization": option}, stage)
    assert next(iter(option)) in str(error.value) and f"engine.zero_stage={stage}" in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    "user",
    [
        {"pipeline": {}},
        {"comms_loger": {"enabled": False}},
        {"train_batchsize": "auto"},
        {"zero_optimization": {"zero_quantized_gradients": True}},
        {"zero_optimization": {"sub_group_size": 1000}},
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        {"zero_optimization": {"stage3_prefetch_bucket_size": 1000}},
        {"zero_optimization": {"stage3_param_persistence_threshold": 1000}},
        {"zero_optimization": {"stage3_max_live_parameters": 1000}},
        {"zero_optimization": {"stage3_max_reuse_distance": 1000}},
    ],
)
def test_options_that_are_not_used_are_named_with_what_there_is(tmp_path, user):
    (key,) = user.get("zero_optimization", user)
    with pytest.raises(BadInput, match=f"does not use DeepSpeed's .*{key}") as error:
        composed(tmp_path, user, stage=3)
    assert all(option in str(error.value) for option in OPTIONS)


@pytest.mark.parametrize("text", ["{", "[1]", '{"zero_optimization": 2}'])
def test_files_that_are_no_configuration(tmp_path, text):
    with pytest.raises(BadInput, match=r"user\.json"):
        composed(tmp_path, text)


def test_a_missing_file(tmp_path):
    with pytest.raises(BadInput, match=r"engine\.deepspeed_json=.*none\.json"):
        deepspeed_config(2, False, str(tmp_path / "none.json"))
