"""The Triton kernels against torch and formulas: in Triton's interpreter, or on the device where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("train.kernels")

from planted import settings_of  # noqa: E402

from train import optimiser, products, single  # noqa: E402
from train.batch_topk import Selection  # noqa: E402
from train.engine import Engine  # noqa: E402
from train.products import ByLatent, ByToken, Gradients, TorchProducts  # noqa: E402
from train.world import World  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# tokens, width, latents, share of the codes that is positive
CASES = [
    (6, 192, 9, 0.5),
    (1, 64, 3, 1.0),
    (7, 1, 5, 0.4),
    (4, 100, 6, 0.5),
    (3, 1152, 4, 0.7),
    (5, 72, 40, 0.05),
    (9, 30, 1, 1.0),
    (4, 80, 6, 0.0),
]


def problem(num_tokens, width, num_latents, share, dtype=torch.float32, num_padding=0):
    """Random weights, activations and gradients, and the entries of random codes."""
    generator = torch.Generator().manual_seed(num_tokens + width)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    acts_BL = draw(num_tokens, num_latents).abs() * (torch.rand(num_tokens, num_latents, generator=generator) < share)
    token_S, latent_S = acts_BL.nonzero(as_tuple=True)
    num_padding = min(num_padding, acts_BL.numel() - len(token_S))  # no more entries than there are scores
    padding = torch.full((num_padding,), num_tokens - 1), torch.full((num_padding,), num_latents - 1)
    code_S = torch.cat([acts_BL[token_S, latent_S], torch.zeros(num_padding)])
    selection = Selection(torch.cat([token_S, padding[0]]).to(DEVICE), torch.cat([latent_S, padding[1]]).to(DEVICE))
    rows = [draw(num_tokens, width), draw(num_tokens, width), draw(num_latents, width)]
    x_BW, grad_BW, W_dec = (row.to(dtype).to(DEVICE) for row in rows)
    b_dec = draw(width).to(DEVICE)
    return acts_BL.double(), selection, code_S.to(DEVICE), x_BW, grad_BW, W_dec, b_dec


def buffers(W_dec, b_dec, value):
    weights = W_dec.float(), W_dec[:, 0].float(), W_dec.float(), b_dec
    return Gradients(*(torch.full_like(weight, value) for weight in weights))


def dense(acts_BL, x_BW, grad_BW, W_dec, b_dec):
    """recons, and the gradients of W_enc, b_enc, W_dec, by dense products in float64."""
    x_BW, grad_BW, W_dec, b_dec = (tensor.cpu().double() for tensor in (x_BW, grad_BW, W_dec, b_dec))
    grad_acts_BL = grad_BW @ W_dec.T * (acts_BL > 0)
    return acts_BL @ W_dec + b_dec, grad_acts_BL.T @ x_BW, grad_acts_BL.sum(0), acts_BL.T @ grad_BW


def assert_close(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours.cpu().double() / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", [kernels, TorchProducts()], ids=["kernels", "torch"])
@pytest.mark.parametrize("num_padding", [0, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_dense_ones_and_overwrite_all_memory(form, case, num_padding):
    """Padding adds nothing, and nothing is left of buffers full of nan."""
    acts_BL, selection, code_S, x_BW, grad_BW, W_dec, b_dec = problem(*case, num_padding=num_padding)
    into = buffers(W_dec, b_dec, torch.nan)
    recons_BW = form.decode(ByToken.of(selection, code_S, len(x_BW)), W_dec, b_dec)
    form.gradients(ByLatent.of(selection, code_S, len(W_dec)), x_BW, grad_BW, W_dec, into)
    assert_close((recons_BW, *into[:3]), dense(acts_BL, x_BW, grad_BW, W_dec, b_dec))


@pytest.mark.parametrize("form", [kernels, TorchProducts()], ids=["kernels", "torch"])
def test_accumulated_gradients_are_added_to_what_is_there(form):
    acts_BL, selection, code_S, x_BW, grad_BW, W_dec, b_dec = problem(*CASES[0])
    into = buffers(W_dec, b_dec, 3.0)._replace(accumulate=True)
    form.gradients(ByLatent.of(selection, code_S, len(W_dec)), x_BW, grad_BW, W_dec, into)
    expected = dense(acts_BL, x_BW, grad_BW, W_dec, b_dec)[1:]
    assert_close(into[:3], [gradient + 3.0 for gradient in expected])


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_bf16_rows_are_summed_in_fp32(case):
    """The result is that of exact sums over the rounded rows; sums in bf16 would be off by 1e-2."""
    acts_BL, selection, code_S, x_BW, grad_BW, W_dec, b_dec = problem(*case, dtype=torch.bfloat16)
    into = buffers(W_dec, b_dec, torch.nan)
    recons_BW = kernels.decode(ByToken.of(selection, code_S, len(x_BW)), W_dec, b_dec)
    kernels.gradients(ByLatent.of(selection, code_S, len(W_dec)), x_BW.float(), grad_BW.float(), W_dec, into)
    assert recons_BW.dtype == torch.float32
    assert_close((recons_BW, *into[:3]), dense(acts_BL, x_BW, grad_BW, W_dec, b_dec))


@pytest.mark.parametrize(("width", "block"), [(7168, 1024), (3584, 512), (1152, 128), (576, 64), (4096, 1024), (6, 64)])
def test_blocks_waste_nothing_where_they_need_not(width, block):
    assert kernels.block_size(width) == block


def test_the_check_at_the_start_finds_no_difference():
    assert kernels.largest_difference(DEVICE) < 1e-4


@pytest.mark.parametrize(
    ("name", "replacement", "said"),
    [
        (None, (7, 5), "compute capability"),
        ("largest_difference", lambda device: 0.5, "differ from dense products by 0.5"),
        ("decode", lambda *arguments: 1 / 0, "do not run"),
        (None, (9, 0), None),
    ],
)
def test_a_gpu_without_working_kernels_falls_back_and_says_so_once(monkeypatch, caplog, name, replacement, said):
    capability = replacement if name is None else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if name is not None:
        monkeypatch.setattr(kernels, name, replacement)
    products._kernels_on.cache_clear()
    found = [products._kernels_on(DEVICE) for _ in range(3)]
    products._kernels_on.cache_clear()
    assert found == [kernels if said is None else None] * 3
    assert len(caplog.records) == (said is not None)
    assert said is None or said in caplog.text


def test_every_kernel_compiles_for_gpus(tmp_path):
    """The interpreter accepts what a compiler would not. Capabilities 8.0 and 9.0, rows in bf16 and fp32."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * 2 * 6
    assert all(int(line.split()[-1]) > 1000 for line in lines)  # bytes of machine code


@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16])
def test_adam_rows_equal_torch_and_leave_norms_and_copies(copy_dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(5, 2 * 72, generator=generator).to(DEVICE)  # noqa: E731
    weight = draw()
    reference = weight.clone().requires_grad_()
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    copy, norms = torch.empty_like(weight, dtype=copy_dtype), torch.empty(5, 2, device=DEVICE)
    for t in range(1, 5):
        gradient = draw()
        reference.grad = gradient * 0.25
        adam.step()
        rates = torch.tensor([0.01 / (1 - 0.9**t), (1 - 0.99**t) ** -0.5, 0.25, 0.0], device=DEVICE)
        kernels.adam_rows(weight, gradient, first, second, rates, (0.9, 0.99), 1e-8, copy, norms)
    torch.testing.assert_close(weight, reference.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copy.float(), weight, rtol=2 * torch.finfo(copy_dtype).eps, atol=0)
    torch.testing.assert_close(norms, weight.view(5, 2, 72).norm(dim=2), rtol=1e-6, atol=0)


def test_adam_rows_are_the_same_where_nobody_wants_norms():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(5, 2 * 72, generator=generator).to(DEVICE) for _ in range(5)]
    rates = torch.tensor([0.1, 1.0, 0.5, 0.0], device=DEVICE)
    (*both, copy), (*others, other_copy) = tensors, [tensor.clone() for tensor in tensors]
    kernels.adam_rows(*both, rates, (0.9, 0.99), 1e-8, copy, torch.empty(5, 2, device=DEVICE))
    kernels.adam_rows(*others, rates, (0.9, 0.99), 1e-8, other_copy)
    for with_norms, without in zip([*both, copy], [*others, other_copy], strict=True):
        assert torch.equal(with_norms, without)


def test_adam_rows_told_to_skip_touch_nothing():
    tensors = [torch.full((3, 10), value, device=DEVICE) for value in (1.0, torch.nan, 3.0, 4.0, 5.0)]
    norms = torch.full((3, 2), 7.0, device=DEVICE)
    rates = torch.tensor([0.1, 1.0, 1.0, 1.0], device=DEVICE)
    kernels.adam_rows(*tensors[:4], rates, (0.9, 0.99), 1e-8, tensors[4], norms)
    assert [tensor[0, 0].item() for tensor in (tensors[0], *tensors[2:], norms)] == [1.0, 3.0, 4.0, 5.0, 7.0]
    assert (norms == 7.0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_kernels_equals_one_on_torch(tmp_path, monkeypatch, precision):
    """The whole way of a GPU, padded selection and sticky checks included, on CPU tensors."""
    settings = settings_of(tmp_path)
    settings.training.precision = precision
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(32, 2, 6, generator=generator) * 2 for _ in range(8)]
    engines = []
    for on_kernels in (False, True):
        if on_kernels:
            monkeypatch.setattr(products, "_kernels_on", lambda device: kernels)
            for module in (products, optimiser, single):
                monkeypatch.setattr(module, "kernels_for", lambda weight: kernels)
        engine = Engine(settings, ["base", "tuned"], 6, torch.zeros(2, 6), torch.ones(2), World.alone())
        engine._deferred = on_kernels
        engine.initialise(data[0])
        engines.append((engine, [engine.step(raw) for raw in data]))
    (torch_engine, expected), (kernel_engine, found) = engines
    assert expected[-1]["train/dead"] > 0
    if precision == "bf16":  # here the torch form decodes in fp32
        losses = ([metrics["train/loss"] for metrics in run] for run in (found, expected))
        assert next(losses) == pytest.approx(next(losses), rel=0.02)
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in torch_engine.crosscoder.state_dict().items():
        torch.testing.assert_close(kernel_engine.crosscoder.state_dict()[name], weight, rtol=0, atol=1e-5)
