"""What a training job would end with is said before it starts."""

import json
import math

import pytest

from extract.command import compose
from extract.errors import BadInput
from train import preflight
from train.preflight import PreflightSettings, check, check_walltime, kind_of, plan_for, seconds_of, tokens_per_second

PAPER = ["experiment=gemma2_9b/pt_simpo", "needs_store=false"]


def settings_of(*overrides: str) -> PreflightSettings:
    return compose(PreflightSettings, [*PAPER, *overrides])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("5:30", 330),
        ("2:00:30", 7230),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:10", 172_810),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
    ],
)
def test_times_are_read_as_slurm_writes_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-3", "1-"])
def test_other_times_are_refused(text):
    with pytest.raises(BadInput, match="is no time"):
        seconds_of(text)


def test_a_missing_store_is_named_with_what_makes_it(tmp_path):
    with pytest.raises(BadInput, match=r"tokens does not exist. Run `python -m extract.tokens experiment=gemma2_9b`"):
        check(settings_of("needs_store=true", f"outputs={tmp_path}"))
    tokens = tmp_path / "store" / "tokens"
    tokens.mkdir(parents=True)
    (tokens / "manifest.json").touch()
    (tmp_path / "store" / "activations" / "pt" / "block20").mkdir(parents=True)
    (tmp_path / "store" / "activations" / "pt" / "block20" / "shard-00000.tar").touch()
    with pytest.raises(BadInput, match=r"pt/block20 is not complete. Run `python -m extract.activations"):
        check(settings_of("needs_store=true", f"outputs={tmp_path}"))
    check(settings_of("needs_store=true", f"outputs={tmp_path}", "data=online", "gpu=none"))  # tokens suffice


def test_memory_that_does_not_suffice_is_said_with_what_would_do():
    """28 GiB on one GPU (weights, gradients and moments of 1.64 G parameters in fp32: 24.5) exceed 23.6."""
    with pytest.raises(BadInput, match=r"engine=single on 1 x rtx_3090 needs 2\d\.\d GiB .* of 23\.6 GiB"):
        check(settings_of("gpu=rtx_3090"))
    check(settings_of("gpu=h100"))
    check(settings_of("gpu=rtx_3090", "engine=latent", "gpus=4"))


def test_a_number_of_ranks_that_does_not_divide_is_refused():
    with pytest.raises(BadInput, match="no multiple of 3"):
        settings_of("gpus=3")


def test_nothing_is_planned_where_no_gpu_is_known(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert plan_for(settings_of()) is None
    assert plan_for(settings_of("gpu=none")) is None
    assert plan_for(settings_of("gpu=h100", "training.device=cpu")) is None
    assert plan_for(settings_of("gpu=h100")) is not None


@pytest.mark.parametrize(
    ("driver", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 3090", "rtx_3090"),
        ("Some other one", "h100"),
    ],
)
def test_gpus_are_known_by_their_drivers_names(driver, kind):
    assert kind_of(driver) == kind


def test_a_time_limit_must_hold_a_checkpoint_interval():
    """1000 steps of 2048 tokens at 10,240 tokens/s are 200 s; 60 s to start and 120 s of notice make 380."""
    rate = 10_240.0
    check_walltime(settings_of("walltime=6:20"), rate)
    with pytest.raises(BadInput, match=r"6:19 \(379 s\), is shorter .* 380 s .*checkpoint_every=1000"):
        check_walltime(settings_of("walltime=6:19"), rate)
    check_walltime(settings_of("walltime=6:19", "training.checkpoint_every=900"), rate)
    check_walltime(settings_of("walltime=3:00"), None)  # nothing is known of its speed: start-up and notice
    with pytest.raises(BadInput, match="start-up 60 s, notice to save 120 s"):
        check_walltime(settings_of("walltime=2:59"), None)
    check_walltime(settings_of(), rate)


def test_a_run_shorter_than_the_interval_needs_no_more_than_itself():
    """9,216 tokens at 1024 tokens/s are 9 s."""
    short = ["training.num_tokens=9216", "training.num_tokens_per_step=1024", "training.warmup_steps=2"]
    short += ["crosscoder.threshold_start_step=2"]
    check_walltime(settings_of("walltime=3:09", *short), 1024.0)
    with pytest.raises(BadInput, match="189 s"):
        check_walltime(settings_of("walltime=3:08", *short), 1024.0)


def test_a_time_limit_beyond_the_partitions_is_refused():
    check_walltime(settings_of("walltime=1:00:00", "partition_limit=1:00:00"), None)
    with pytest.raises(BadInput, match="exceeds that of the partition, 1:00:00"):
        check_walltime(settings_of("walltime=1:00:01", "partition_limit=1:00:00"), None)


def test_the_speed_of_an_earlier_start_comes_before_the_plans(tmp_path):
    settings = settings_of("gpu=h100")
    plan = plan_for(settings)
    planned = tokens_per_second(settings, tmp_path, plan)
    assert planned is not None and 1e3 < planned < 1e6
    assert tokens_per_second(settings, tmp_path, None) is None
    rates = [9.0, 100.0, 1.0]
    lines = [json.dumps({"step": step, "speed/tokens_per_second": rate}) for step, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "speed/tok']))
    assert tokens_per_second(settings, tmp_path, plan) == 9.0


def test_a_study_is_checked_pair_by_pair(capsys):
    preflight.main(compose(PreflightSettings, ["experiment=gemma2_9b", "needs_store=false", "gpu=h100"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["pair pt_it experiment=gemma2_9b/pt_it", "pair pt_simpo experiment=gemma2_9b/pt_simpo"]
    assert lines[-1] == "outputs outputs/gemma2_9b" and len(lines) == 5
