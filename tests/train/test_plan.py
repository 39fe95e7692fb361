"""What a plan says: counts and bytes by hand, rooflines on round numbers, the choice of an engine, and refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planted import random_store, settings_of

import train.plan
from extract.command import CONFIGS, compose
from extract.errors import BadInput
from train.gpus import GPUS, Gpu, gpu_named
from train.job import Job, Layout, layouts
from train.plan import PlanSettings, make_plan, store_facts
from train.plan_options import Option, Plan, StoreFacts, choice, duration, fastest, warnings
from train.plan_table import TOTAL_WIDTH, report
from train.step_time import (
    Machine,
    StepTime,
    sent_across,
    sent_by_all,
    sent_bytes,
    sent_within,
    step_flops,
    step_time,
)

ROOT = Path(__file__).parent.parent.parent
HEADLINE = ["experiment=gemma2_9b/pt_simpo", "gpus=8", "gpu=h100", "read_gbps=5"]
PAIRS = sorted(str(p.relative_to(CONFIGS / "experiment").with_suffix("")) for p in CONFIGS.glob("experiment/*/*.yaml"))
# 1 TFLOP/s, 1 GB/s to memory, 1 GB/s to other GPUs, all of it attained; the store is read at 1 GB/s.
ROUND = Machine(Gpu("round", 1, 1, 100, 1, 1), 4, 8, 1.0, 0.5, 1.0)
SMALL = Job(num_tokens=64, num_models=2, d_model=8, num_latents=32, k=4, stored_token_bytes=64)


def plan_of(*overrides: str) -> Plan:
    return make_plan(compose(PlanSettings, [*HEADLINE, *overrides]))


def test_the_headline_job_is_the_papers():
    """L 114,688 x W 7,168 twice, L + W biases; a token pair is 14,336 bytes, 200M are 2.87 TB."""
    plan = plan_of()
    assert plan.job.num_parameters == 1_644_167_168 + 114_688 + 7_168
    assert "1.64 B" in report(plan)
    assert plan.job.stored_token_bytes == 14_336
    assert plan.num_steps * plan.job.num_tokens * plan.job.stored_token_bytes == pytest.approx(2.87e12, rel=2e-3)
    assert plan.disk["activations"] == 200e6 * (14_336 + 2 * 4)
    assert plan.disk["crosscoder"] == 4 * plan.job.num_parameters
    assert plan.disk["checkpoints"] == (2 + 1) * 12 * plan.job.num_parameters


def test_memory_is_that_of_the_largest_part_of_a_run():
    """A host has 12 bytes a parameter of a rank's part for a checkpoint; where no device has the whole crosscoder, rank
    0's has it in the end.
    """
    plan = plan_of()
    for option in plan.options:
        needed = {part: sum(memory.values()) for part, memory in option.parts.items()}
        assert list(needed) == ["steps", "validation", "saving"] and option.peak == max(needed.values())
    hosts = {option.layout.label: option.host for option in plan.options}
    assert hosts["fsdp"] == 12 * plan.job.num_parameters / 8
    assert hosts["ZeRO-1"] == hosts["latent"] == 4 * plan.job.num_parameters
    text = report(plan)
    assert all(re.search(rf"^ +in {part} .*\d", text, re.MULTILINE) for part in needed)


def test_flops_of_a_token_are_one_product_or_five():
    """1.644 GF a product; the sparse step costs one and 0.35 %, so 4.98 times less than dense autograd."""
    sparse = replace(plan_of().job, num_dead=0)
    one_product = 2 * 114_688 * 7_168
    assert step_flops(replace(sparse, step="readable")) == 5 * one_product * 2048
    assert step_flops(sparse) == pytest.approx((1 + 4 * 100 / 114_688) * one_product * 2048, rel=1e-12)
    with_auxk = replace(sparse, num_dead=1000)
    assert step_flops(with_auxk) - step_flops(sparse) == 8 * 2048 * 1000 * 7_168


def test_bytes_sent_are_the_published_numbers_of_values():
    """Values times (R - 1) / R: latent 3 B M D; gathered weights and reduced gradients, once each, 4 L M D."""
    job = replace(SMALL, stored_token_bytes=4 * SMALL.width)
    weights = 32 * job.width + (32 + job.width) / 2  # L M D, and half of the biases
    assert sent_bytes(job, Layout("single")) == 0
    assert sent_within(job, Layout("latent", 4)) == 0.75 * 64 * (4 * 3 * job.width + 8)
    for stage in (1, 2, 3):
        assert sent_within(job, Layout("deepspeed", 4, stage)) == 0.75 * 4 * 4 * weights
    assert sent_within(job, Layout("fsdp", 4)) == 0.75 * 4 * (4 * weights + 32 * 2)  # and the decoder norms
    bf16 = replace(job, precision="bf16")
    assert sent_within(job, Layout("fsdp", 4)) - sent_within(bf16, Layout("fsdp", 4)) == 0.75 * 2 * 2 * 32 * job.width
    # One more partial sum, its gradient, twice 7 x 15 + 7 counts of a token's scores and two of its ties; in several
    # micro-batches a partial sum for the variance of the error.
    with_auxk = replace(job, num_dead=5)
    assert sent_within(with_auxk, Layout("latent", 4)) == 0.75 * 4 * 64 * (5 * job.width + 2 + 2 * 112 + 2)
    in_parts = replace(with_auxk, num_micro_steps=2)
    assert sent_within(in_parts, Layout("latent", 4)) == 0.75 * 4 * 64 * (6 * job.width + 2 + 2 * 112 + 2)


def test_copies_send_within_as_fewer_ranks_do_and_across_the_gradients_of_their_part():
    job = replace(SMALL, stored_token_bytes=4 * SMALL.width)
    copies = [Layout(engine, 8, ranks_per_copy=4) for engine in ("fsdp", "latent")]
    gradients = 0.5 * 2 * 4 * job.num_parameters / 4
    assert [sent_across(job, layout) for layout in copies] == [gradients, gradients + 0.5 * 2 * 4 * 32 / 4]
    assert sent_across(job, Layout("fsdp", 8)) == sent_across(job, Layout("latent", 8)) == 0
    assert sent_within(job, copies[0]) == sent_within(job, Layout("fsdp", 4))
    half = replace(job, num_tokens=32)  # a copy's ranks have half of the tokens
    assert sent_within(job, copies[1]) == sent_within(half, Layout("latent", 4))


def test_all_ranks_sum_histograms_of_scores_and_places():
    """Digits of 12 bits: 31 bits of a score and the 11 of 64 x 32 places; a float for each latent that fired."""
    counts = 8 * (2 * 2**12 + 2**7 + 2**11)
    assert sent_by_all(SMALL, Layout("fsdp", 4)) == 0.75 * 2 * (counts + 4 * 32)
    assert sent_by_all(replace(SMALL, num_dead=1), Layout("latent", 4)) == 0.75 * 2 * (counts + 4 * 16 + 8 * 16)


def test_a_part_takes_what_its_flops_or_its_bytes_take():
    job = replace(SMALL, num_tokens=2**20, num_latents=2**15, k=1)
    parts = step_time(job, Layout("single"), ROUND).parts
    product = 2 * 2**20 * 2**15 * 16 / 1e12
    moved = 4 * (2**20 * 2**15 + 2**15 * 16 + 2**20 * 16) / 1e9
    assert moved > product and parts["encoder product"] == moved
    faster_memory = replace(ROUND, gpu=replace(ROUND.gpu, memory_gbps=1e6))
    assert step_time(job, Layout("single"), faster_memory).parts["encoder product"] == product
    assert parts["Adam"] == 32 * job.num_parameters / 1e9
    bf16 = step_time(replace(job, precision="bf16"), Layout("single"), ROUND).parts
    assert bf16["Adam"] == 34 * job.num_parameters / 1e9


def test_half_the_efficiency_takes_twice_as_long_and_reading_does_not_change():
    whole, half = (step_time(SMALL, Layout("latent", 4), replace(ROUND, efficiency=e)) for e in (1.0, 0.5))
    assert half.work == pytest.approx(2 * whole.work) and half.read == whole.read == 64 * 64 / 1e9


def test_engines_divide_the_work():
    """Ranks have a quarter of the tokens, or of the latents, and Adam a quarter of the weights."""
    job = replace(SMALL, num_tokens=4096, num_latents=4096, num_dead=64)
    single, fsdp, latent = (step_time(job, Layout(e, n), ROUND) for e, n in (("single", 1), ("fsdp", 4), ("latent", 4)))
    for name in ("selection", "Adam"):
        assert fsdp.parts[name] == latent.parts[name] == single.parts[name] / 4
    assert single.parts["kept codes"] / 4 < fsdp.parts["kept codes"]  # each rank writes all gradients
    copies = step_time(job, Layout("latent", 4, ranks_per_copy=2), ROUND)
    assert copies.parts["selection"] == latent.parts["selection"] and copies.parts["Adam"] == 2 * latent.parts["Adam"]


def test_communication_takes_the_slowest_link():
    across = replace(ROUND, num_gpus=16)
    sent = sent_bytes(SMALL, Layout("latent", 16))
    assert step_time(SMALL, Layout("latent", 16), across).communication == sent / 0.5e9
    assert step_time(SMALL, Layout("latent", 16), replace(across, gpus_per_node=16)).communication == sent / 1e9
    copies = Layout("latent", 16, ranks_per_copy=8)
    seconds = sent_within(SMALL, copies) / 1e9 + (sent_across(SMALL, copies) + sent_by_all(SMALL, copies)) / 0.5e9
    assert step_time(SMALL, copies, across).communication == pytest.approx(seconds)


def test_reading_passes_beside_the_step_and_bounds_it_when_it_is_longer():
    time = StepTime({"encoder product": 2.0, "Adam": 3.0}, communication=1.0, read=5.0)
    assert (time.step, time.bound_by) == (6.0, "Adam")
    assert (replace(time, read=7.0).step, replace(time, read=7.0).bound_by) == (7.0, "reading")
    assert replace(time, communication=9.0).bound_by == "communication"


def option(engine: str, seconds: float, fits: bool = True, ranks: int = 8) -> Option:
    return Option(Layout(engine, ranks), {"steps": {"weights": 2**30}}, StepTime({"Adam": seconds}, 0.0, 0.0), fits)


def test_the_fastest_that_fits_is_chosen_and_the_simpler_of_two_about_as_fast():
    single, fsdp, latent = option("single", 10), option("fsdp", 4.2), option("latent", 4.0)
    assert fastest([single, fsdp, latent]) is fsdp
    assert fastest([single, replace(fsdp, fits=False), latent]) is latent
    assert fastest([replace(single, fits=False)]) is None


def plan_with(*options: Option) -> Plan:
    return replace(plan_of(), options=list(options))


def test_the_choice_says_how_to_ask_for_it_and_what_would_be_needed():
    text = choice(plan_with(option("single", 0.1, ranks=1), option("latent", 0.098)))
    assert text == "engine=single on 1 of 8 GPUs: 2.7 h, bound by Adam."
    text = choice(plan_with(option("single", 0.1, ranks=1), option("latent", 0.05)))
    assert text == "engine=latent on 8 GPUs: 1.4 h, bound by Adam."
    nothing = plan_of("gpus=2", "gpu_memory_gib=12")
    assert choice(nothing).startswith("none: no engine fits into 12 GiB. On 4 of these GPUs engine=latent would")
    tiny = replace(nothing.machine, gpu=replace(nothing.machine.gpu, memory_gib=2))
    assert "Nor would another, on up to 64" in choice(replace(nothing, machine=tiny))


def test_layouts_are_named_as_settings_ask_for_them():
    assert layouts(1) == [Layout("single")]
    labels = ["single", "fsdp", "fsdp/4", "ZeRO-1", "ZeRO-2", "ZeRO-3", "latent", "latent/4"]
    assert [layout.label for layout in layouts(8, ranks_per_copy=4)] == labels
    assert [layout.label for layout in layouts(4, ranks_per_copy=4)] == [n for n in labels if "/" not in n]
    assert Layout("deepspeed", 8, 2).setting == "engine=deepspeed engine.zero_stage=2"
    assert Layout("deepspeed", 8, 3, True).setting.endswith("engine.zero_stage=3 engine.offload_optimizer=true")
    assert Layout("fsdp", 8, ranks_per_copy=4).setting == "engine=fsdp engine.ranks_per_copy=4"
    assert Layout("fsdp", 8, ranks_per_copy=8).setting == "engine=fsdp"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=l4", "gpus=1"], "Does not fit"),
        (["read_gbps=0.1"], "I/O-bound"),
        (["training.precision=fp32"], "training.precision=fp32: the products of h100 are 15 times faster in bf16"),
        (["training.precision=bf16"], "Small batch"),
        (["training.num_tokens_per_step=153600", "crosscoder.threshold_start_step=100"], "Large batch: beyond"),
        (["corpus.num_tokens=100_000_000"], "100.0M tokens: 2.0 epochs"),
    ],
)
def test_warnings(overrides: list[str], message: str):
    large = ["training.warmup_steps=100"]
    assert any(message in warning for warning in warnings(plan_of(*overrides, *large)))
    others = plan_of("read_gbps=1000", "training.num_tokens_per_step=65536", "training.precision=bf16", *_short())
    assert not any(message.split(":")[0] in warning for warning in warnings(others))


def test_beyond_the_number_that_is_named_latent_sends_more():
    plan = plan_of("training.num_tokens_per_step=153600", *_short())
    (warning,) = [w for w in warnings(plan) if w.startswith("Large batch")]
    crossing = int(re.search(r"beyond ([\d,]+) tokens", warning)[1].replace(",", ""))
    assert "than fsdp" in warning  # which gathers bf16 where ZeRO gathers float32
    for factor in (0.99, 1.01):
        job = replace(plan.job, num_tokens=int(factor * crossing))
        assert (sent_bytes(job, Layout("latent", 8)) > sent_bytes(job, Layout("fsdp", 8))) is (factor > 1)


def _short() -> list[str]:
    return ["training.warmup_steps=100", "crosscoder.threshold_start_step=100"]


def test_the_bandwidth_that_ends_the_waiting_ends_it():
    slow = plan_of("gpus=1", "read_gbps=0.1")
    (warning,) = [w for w in warnings(slow) if w.startswith("I/O-bound")]
    needed = float(re.search(r"single read_gbps=(\d+\.?\d*)", warning)[1])
    enough = step_time(slow.job, Layout("single"), replace(slow.machine, read_gbps=1.05 * needed))
    short = step_time(slow.job, Layout("single"), replace(slow.machine, read_gbps=0.95 * needed))
    assert enough.bound_by != "reading" and short.bound_by == "reading"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=h101"], "gpu=h101 is not known. Did you mean h100? Known: b200"),
        (["gpu=tpu", "gpu_tflops=100"], "gpu_memory_gib=, gpu_tflops= (in training.precision), gpu_memory_gbps="),
        (["gpu_memory_gbps=0"], "gpu_memory_gbps=0.0 must be greater than 0"),
        (["gpu_tflops=-1"], "gpu_tflops=-1.0 must be greater than 0"),
        (["gpus=0"], "gpus=0 must be greater than 0"),
        (["gpus=7"], "training.num_tokens_per_step=2048 is no multiple of 7 (7 ranks x training.num_micro_steps=1)"),
        (["gpus=12"], "gpus=12 must be a multiple of gpus_per_node=8. Nearest: 8 or 16"),
        (
            ["engine=fsdp", "engine.ranks_per_copy=3"],
            "gpus=8 must be a multiple of engine.ranks_per_copy=3. Nearest: 6 or 9",
        ),
        (["read_gbps=0"], "read_gbps=0.0 must be greater than 0"),
        (["efficiency=1.2"], "efficiency=1.2"),
        (["dead_share=1"], "dead_share=1.0"),
        (["models.pt.d_model=null"], "width of model pt is not known"),
        (["models.pt.d_model=2304"], "The models differ in width"),
    ],
)
def test_refusals(overrides: list[str], message: str):
    with pytest.raises(BadInput, match=re.escape(message)):
        plan_of(*overrides)


def test_a_gpu_of_ones_own():
    own = gpu_named("mine", 40.0, 100.0, 1000.0, 30.0)
    assert own == Gpu("mine", 100.0, 100.0, 40.0, 1000.0, 30.0)
    assert gpu_named("H100", 94.0, None, None, None) == replace(GPUS["h100"], memory_gib=94.0)
    assert gpu_named("a100-40gb", None, None, None, None) == GPUS["a100_40gb"]


def test_a_store_says_more_than_the_settings(tmp_path: Path):
    lengths = random_store(tmp_path / "store", d_model=6)
    settings = settings_of(tmp_path)
    settings.models["base"].d_model = settings.models["tuned"].d_model = 999
    files = (tmp_path / "store" / "activations").glob("*/*/shard-*.tar")
    disk = sum(path.stat().st_size for path in files)
    assert store_facts(settings) == StoreFacts(6, "bf16", 2 * 6 * 2, sum(lengths), disk)


def test_without_a_store_codecs_decide_the_bytes(tmp_path: Path):
    settings = settings_of(tmp_path)
    settings.models["base"].d_model = settings.models["tuned"].d_model = 10
    for codec, token_bytes in ((None, 2 * 20), ("fp32", 2 * 40), ("fp8", 2 * 14)):
        settings.activations.codec = codec
        assert store_facts(settings).token_bytes == token_bytes
    settings.models["tuned"].dtype, settings.activations.codec = "float32", None
    assert (store_facts(settings).codec, store_facts(settings).token_bytes) == ("bf16+fp32", 20 + 40)


@pytest.mark.parametrize("experiment", PAIRS)
@pytest.mark.parametrize("step", ["sparse", "readable"])
def test_every_pair_can_be_planned_and_fits_the_terminal(experiment: str, step: str):
    settings = compose(PlanSettings, [f"experiment={experiment}", "gpus=8", "store=nowhere", f"training.step={step}"])
    text = report(make_plan(settings))
    assert max(map(len, text.splitlines())) <= TOTAL_WIDTH
    assert "choose  engine=" in text or "choose  none" in text


def test_online_nothing_is_read_and_no_activations_are_stored():
    plan = plan_of("data=online")
    assert all(option.time.read == 0 for option in plan.options) and plan.disk["activations"] == 0
    assert "computed while training" in report(plan) and any("data=online" in w for w in warnings(plan))
    assert not any("training.recovered_tokens" in w for w in warnings(plan))


def test_language_models_beside_training_are_said_to_be_left_out():
    found = warnings(plan_of("training.recovered_tokens=1000"))
    assert sum("training.recovered_tokens" in w and "not part of this plan" in w for w in found) == 1


def test_durations():
    assert [duration(hours) for hours in (1.5, 0.2, 0.01)] == ["1.5 h", "12.0 min", "36 s"]


def test_every_setting_of_a_plan_is_documented():
    source = Path(train.plan.__file__).read_text().split("class PlanSettings")[1].split("    def ")[0].splitlines()
    fields = [number for number, line in enumerate(source) if re.match(r"    \w+: ", line)]
    assert len(fields) == 11 and all(source[number - 1].strip().startswith("#") for number in fields)


def test_the_command_prints_the_plan_and_one_line_for_a_mistake(tmp_path: Path):
    command = [sys.executable, "-m", "train.plan", "experiment=gemma2_9b/pt_simpo", f"outputs={tmp_path}"]
    done = subprocess.run([*command, "gpus=8", "gpu=h100"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "1.64 B" in done.stdout and "choose  engine=" in done.stdout
    failed = subprocess.run([*command, "gpu=h101"], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 2 and failed.stderr.startswith("error: gpu=h101") and failed.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
