"""Codecs: error bounds, exact rows, round trips, and the bytes of `.safetensors`."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor

from extract.codecs import CODECS, Encoded, codec_named, codec_of, decode, deserialise, encode, serialise
from extract.errors import BadInput

WIDTH = 48


def rows() -> Tensor:
    """Ordinary and adversarial rows, float32: each codec's bound must hold on every value."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, WIDTH, generator=generator)
    spread = torch.randn(200, WIDTH, generator=generator) * 10.0 ** torch.linspace(-4, 4, WIDTH)
    one_huge = torch.randn(20, WIDTH, generator=generator)
    one_huge[:, 7] = 6e4
    zeros = torch.zeros(2, WIDTH)
    one_value = torch.zeros(3, WIDTH)
    one_value[torch.arange(3), torch.arange(3)] = torch.tensor([1.0, -3.7, 1e-30])
    denormal = torch.randn(20, WIDTH, generator=generator) * 1e-40
    smallest = torch.full((1, WIDTH), 2.0**-149)
    equal = torch.full((2, WIDTH), -1.1)
    halves = (torch.arange(WIDTH).float() - 20.5).repeat(2, 1)  # ties of int8 when the scale is 1
    halves[:, 0] = 127
    return torch.cat([noise, spread, one_huge, zeros, one_value, denormal, smallest, equal, halves])


def scales_by_definition(x_ND: Tensor, largest: float) -> list[float]:
    """max |x| / largest, rounded up to 16 significant bits, at least 2^-126, in Python's float64."""
    scales = []
    for row in x_ND.abs().tolist():
        mantissa, exponent = torch.frexp(torch.tensor(max(row) / largest, dtype=torch.float64))
        rounded = torch.ceil(mantissa * 2**16) / 2**16
        scales.append(max(float(torch.ldexp(rounded, exponent)), 2.0**-126))
    return scales


def bound(name: str, x_ND: Tensor) -> Tensor:
    x_ND = x_ND.double().abs()
    if name == "fp32":
        return torch.zeros_like(x_ND)
    if name == "bf16":
        return (x_ND * 2**-8).clamp(min=2.0**-134)
    if name == "fp16":
        return (x_ND * 2**-11).clamp(min=2.0**-25)
    scale_N1 = torch.tensor(scales_by_definition(x_ND, CODECS[name].largest), dtype=torch.float64)[:, None]
    slack = 1 + 2**-20
    if name == "fp8":
        return torch.maximum(x_ND * 2**-4, scale_N1 * 2**-10) * slack
    return (scale_N1 / 2 * slack).expand_as(x_ND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_every_value_is_within_the_bound(name: str, dtype: torch.dtype):
    x_ND = rows().to(dtype)
    encoded = encode(CODECS[name], x_ND)
    decoded_ND = decode(encoded)
    assert encoded.codes_ND.dtype == CODECS[name].dtype and decoded_ND.shape == x_ND.shape
    error_ND = (decoded_ND.double() - x_ND.double()).abs()
    assert (error_ND <= bound(name, x_ND)).all()
    zero_N = (x_ND == 0).all(1)
    assert zero_N.any() and not decoded_ND[zero_N].any()


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_the_bound_is_reached(name: str):
    """A bound that no value comes near would hide a codec twice as bad as it could be."""
    x_ND = rows()[:400]
    error_ND = (decode(encode(CODECS[name], x_ND)) - x_ND).abs()
    assert (error_ND / bound(name, x_ND)).max() > 0.95


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_scales_and_codes_are_those_of_the_definition(name: str):
    x_ND, codec = rows(), CODECS[name]
    encoded = encode(codec, x_ND)
    scales = scales_by_definition(x_ND, codec.largest)
    # amax / largest is rounded to float32 before it is rounded up, which can move it over one step of 16 bits
    torch.testing.assert_close(encoded.scales_N.double(), torch.tensor(scales).double(), rtol=2**-15, atol=0)
    assert encoded.scales_N.dtype == torch.float32 and (encoded.scales_N >= 2.0**-126).all()
    assert (encoded.scales_N.view(torch.int32) & 0xFF == 0).all()
    scaled_ND = x_ND / encoded.scales_N[:, None]
    if name == "int8":
        expected = [[round(value) for value in row] for row in scaled_ND.tolist()]  # Python rounds ties to even
        assert encoded.codes_ND.tolist() == expected
    else:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        values = values[values.isfinite()]
        nearest_ND = (scaled_ND.double()[..., None] - values).abs().amin(-1)
        assert torch.equal((scaled_ND.double() - encoded.codes_ND.double()).abs(), nearest_ND)


@pytest.mark.parametrize("name", CODECS)
def test_encoding_what_was_decoded_changes_nothing(name: str):
    first = encode(CODECS[name], rows())
    second = encode(CODECS[name], decode(first))
    assert torch.equal(second.codes_ND.view(torch.uint8), first.codes_ND.view(torch.uint8))
    if first.scales_N is not None:
        assert torch.equal(second.scales_N, first.scales_N)


def test_every_fp8_code_is_decoded_exactly():
    codes_ND = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    finite = codes_ND.double().isfinite()
    scales_N = torch.tensor([0.75])
    decoded_ND = decode(Encoded(codes_ND, scales_N))
    assert finite.sum() == 254 and torch.equal(decoded_ND.double()[finite], codes_ND.double()[finite] * 0.75)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_rows_do_not_depend_on_their_company(name: str):
    """Encoding works in groups of rows; one row must not feel where its group ends."""
    x_ND = torch.randn(3, 100_000)  # more than one group
    whole = encode(CODECS[name], x_ND)
    for t in range(3):
        alone = encode(CODECS[name], x_ND[t : t + 1])
        assert torch.equal(alone.codes_ND[0].float(), whole.codes_ND[t].float())
        assert torch.equal(decode(alone)[0], decode(whole)[t])


@pytest.mark.parametrize("name", CODECS)
def test_no_rows(name: str):
    assert decode(encode(CODECS[name], torch.empty(0, 5))).shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_stays_so(name: str, bad: float):
    x_ND = torch.ones(2, 5)
    x_ND[1, 3] = bad
    decoded_ND = decode(encode(CODECS[name], x_ND))
    assert torch.isfinite(decoded_ND[0]).all() and not torch.isfinite(decoded_ND[1]).all()


def test_codecs_by_name_and_dtype():
    assert codec_of(torch.bfloat16) is CODECS["bf16"] and codec_of(torch.float64) is codec_of(torch.int8) is None
    with pytest.raises(BadInput, match="codec=fp4 is not one of bf16, fp16, fp32, fp8, int8"):
        codec_named("fp4")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(7, 5), (1, 8), (0, 4)])
def test_bytes_are_those_of_the_safetensors_library(name: str, shape: tuple[int, int]):
    encoded = encode(CODECS[name], torch.randn(shape))
    tensors = {"acts": encoded.codes_ND, "norms": torch.rand(shape[0])}
    if encoded.scales_N is not None:
        tensors["scales"] = encoded.scales_N
    data = b"".join(serialise(tensors))
    assert data == safetensors.torch.save(tensors)
    again = deserialise(memoryview(bytearray(data)))
    assert set(again) == set(tensors)
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and again[key].shape == tensor.shape
        assert torch.equal(again[key].float(), tensor.float())


def test_serialising_copies_nothing():
    acts_ND = torch.zeros(4, 6)
    header, acts, _ = serialise({"acts": acts_ND, "norms": torch.zeros(4)})
    acts_ND[0, 0] = 1.0
    assert bytes(acts[:4]) == b"\x00\x00\x80\x3f"
