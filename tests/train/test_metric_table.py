"""The table of metrics against what is logged, and histograms and rooflines against numbers made by hand."""

from __future__ import annotations

import json

import pytest
import torch
from planted import random_store, settings_of

from extract.metrics_file import Histogram
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.gpus import GPUS, Gpu, gpu_of
from train.histograms import delta_norm_histograms, frequency_histogram
from train.job import Job, Layout
from train.metric_table import EVERY, METRICS, NUMBER, VALIDATION, best_values, metric_of, units
from train.metrics import Throughput, validation_metrics
from train.roofline import Roofline
from train.step_time import Machine
from train.trainer import train


def test_names_are_sections_and_quantities_that_do_not_meet():
    for metric in METRICS:
        assert metric.name.startswith(f"{metric.section}/") and metric.about.endswith(".")
    for name in ("train/loss", "val/delta_norm/base@block1_tuned", "analysis/latents/a,k=3/base"):
        assert sum(metric.matches(name) for metric in METRICS) == 1
    assert metric_of("step") is None and metric_of("train/losses") is None and metric_of("val/silent/x") is None
    assert units("memory") == {"memory/host_gb": "GB", "memory/gpu_peak_gb": "GB"}
    assert best_values()["val/variance_explained/*"] == "max" and "train/lr" not in best_values()


def test_delta_norm_of_every_pair():
    """Latents of norms (a, b, c): a and b alike, c absent; b alone; none has the third."""
    norms_LM = torch.tensor([[2.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    found = delta_norm_histograms(norms_LM, ["a", "b", "c"])
    assert list(found) == ["val/delta_norm/a_b", "val/delta_norm/a_c", "val/delta_norm/b_c"]
    counts = {name: {i: n for i, n in enumerate(h.counts) if n} for name, h in found.items()}
    assert counts == {"val/delta_norm/a_b": {25: 1, 50: 1}, "val/delta_norm/a_c": {0: 1}, "val/delta_norm/b_c": {0: 2}}
    edges = found["val/delta_norm/a_b"].edges
    assert len(edges) == 52 and (edges[0], edges[-1]) == (0, 1) and edges[25] < 0.5 < edges[26]


def test_firing_frequencies_are_on_a_logarithmic_scale():
    """Of 10^8 tokens: never, on one (below the last bin), on 10^6 * 1.1 (-1.96), on all."""
    histogram = frequency_histogram(torch.tensor([0.0, 1.0, 1.1e6, 1e8]), 1e8)
    assert histogram.edges[0] == -7 and histogram.edges[-1] == 0 and len(histogram.counts) == 70
    assert {i: n for i, n in enumerate(histogram.counts) if n} == {0: 1, 50: 1, 69: 1}


def test_a_validation_pass_tells_which_latents_fire():
    """Four latents that read one direction each; tokens excite latents 0 (twice), 1 and 3, of which 0 and 1 are those
    dedicated to the first and second model.
    """
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=4, k=1, dedicated=0.25), ["base", "tuned"], 2, "block1")
    with torch.no_grad():
        crosscoder.W_enc.copy_(torch.eye(4))
        crosscoder.W_dec.copy_(torch.eye(4))
    crosscoder.threshold = 0.5
    x_BMD = torch.eye(4)[[0, 1, 3, 0]].view(4, 2, 2)
    found = validation_metrics(crosscoder, [(x_BMD, None)])
    assert found["val/l0"] == 1 and found["val/silent"] == 1
    assert found["val/dedicated_firing/base"] == 1 and found["val/dedicated_firing/tuned"] == 1
    frequency, delta = found["val/firing_frequency"], found["val/delta_norm/base_tuned"]
    assert isinstance(frequency, Histogram) and isinstance(delta, Histogram)
    # log10 of 1/4 (two latents) and of 1/2, in bins of a tenth: [-0.7, -0.6) and [-0.4, -0.3).
    assert {i: n for i, n in enumerate(frequency.counts) if n} == {63: 2, 66: 1}
    assert (delta.counts[0], delta.counts[-1], sum(delta.counts)) == (2, 2, 4)  # rows of the one or the other model
    assert all(metric_of(name) for name in found)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA RTX A6000", "rtx_a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_their_drivers_names(device: str, name: str | None):
    found = gpu_of(device)
    assert found is (None if name is None else GPUS[name])


def test_the_share_of_the_roofline():
    """2 B L W = 2 * 2^40 FLOP in the encoder alone take 2.2 s of 10^12 a second: twice that time is half the peak."""
    gpu = Gpu("round", 1, 1, 100, 1e9, 1)  # memory that takes no time
    job = Job(num_tokens=2**15, num_models=2, d_model=2**9, num_latents=2**15, k=0)
    roofline = Roofline(job, Layout("single"), Machine(gpu, 1, 1, 1.0, 1.0, float("inf")))
    seconds = 2 * 2**40 / 1e12
    assert roofline.share(job.num_tokens / seconds, 0) == pytest.approx(1, rel=1e-4)
    assert roofline.share(job.num_tokens / seconds / 2, 0) == pytest.approx(0.5, rel=1e-4)


def test_speed_leaves_out_what_was_no_training(monkeypatch):
    """200 tokens in 4 s, of which 1 s was waited for data; 10 s of something else; 60 tokens in 2 s."""
    clock = iter([0.0, 4.0, 4.0, 14.0, 16.0, 16.0])
    monkeypatch.setattr("train.metrics.time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    throughput.count(200, waited=1.0)
    assert throughput.read(0) == {"speed/tokens_per_second": 50, "speed/data_wait": 0.25}
    throughput.restart()
    throughput.count(60, waited=0.0)
    assert throughput.read(0) == {"speed/tokens_per_second": 30, "speed/data_wait": 0}


def expected_names(models: list[str], when: str) -> set[str]:
    """What a run of `models` promises without conditions, names filled in."""
    promised = [m for m in METRICS if m.section in ("train", "val", "speed", "memory") and not m.conditional]
    names = {m.name.replace("<model>_<other>", "_".join(models)) for m in promised if m.when == when}
    return {name.replace("<model>", model) for name in names for model in models}


def test_every_line_has_what_the_table_promises(tmp_path):
    random_store(tmp_path / "store")
    settings = settings_of(tmp_path)
    train(settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    every, validation = (expected_names(["base", "tuned"], when) for when in (EVERY, VALIDATION))
    assert len(lines) == settings.training.num_steps and len(validation) > 5
    for line in lines:
        assert every <= line.keys() and (validation <= line.keys()) == (line["step"] in (7, 14, 21, 24))
        assert {name for name in line if metric_of(name) is None} == {"step"}
        for name in line.keys() - {"step"}:
            assert isinstance(line[name], dict) != (metric_of(name).kind == NUMBER)
    assert lines[-1]["val/dedicated_firing/base"] <= 4 and "train/threshold" in lines[-1]
    assert lines[-1]["memory/host_gb"] > 0.05 and "memory/gpu_peak_gb" not in lines[-1]
