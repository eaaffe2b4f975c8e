"""Products with 8-bit and 4-bit weights, against their plain forms."""

import pytest
import torch

from sana_model.kernels import quantized
from sana_model.kernels.quantized import from_int4, to_fp8, to_int4, to_int8, w8a8_linear, w8a8_reference


@pytest.fixture(params=["onednn", "int", "float"])
def product(request, monkeypatch):
    """Each way in which a CPU multiplies 8-bit numbers."""
    if request.param != "float" and not quantized.HAS_VNNI:
        pytest.skip("this CPU's products of 8-bit numbers saturate")
    monkeypatch.setattr(quantized, "_has_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(quantized, "HAS_VNNI", request.param != "float")


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w8a8_equals_its_plain_form_up_to_rounding(dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 5, 52), (36, 52), (36,)))
    x[0, 0] = 0  # a token of zeros has no scale
    x[0, 1] *= 1e4  # one large token costs the others nothing: each has its own scale
    result = w8a8_linear(x, *to_int8(weight), bias)
    expected = w8a8_reference(x, *to_int8(weight), bias)
    rtol, atol = (1e-5, 1e-4) if dtype is torch.float32 else (2e-2, 4e-2)  # rounded before the bias comes in, and after
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(result[0, 0], bias)


@pytest.mark.usefixtures("product")
def test_a_token_with_a_nan_becomes_nan_and_the_others_stay_as_they_are():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 52), torch.randn(36, 52)
    expected = w8a8_linear(x, *to_int8(weight), None)
    x[1, 7] = torch.nan
    expected[1] = torch.nan
    assert torch.equal(w8a8_linear(x, *to_int8(weight), None).nan_to_num(1e9), expected.nan_to_num(1e9))
    for quantize in (to_int8, to_fp8, to_int4):  # a bad weight is not hidden either
        assert quantize(x)[1].isfinite().all(dim=1).tolist() == [True, False, True]


def test_the_products_in_float32_are_exact_for_rows_of_any_width():
    numbers, weight = torch.full((2, 2500), 127.0), torch.full((3, 2500), 127, dtype=torch.int8)
    numbers[1, ::2] = -126
    assert torch.equal(quantized._float_mm(numbers, weight), (numbers.long() @ weight.long().t()).int())


def test_w8a8_with_float16_does_not_overflow_before_the_tokens_scales_come_in():
    x, weight = torch.full((3, 4096), 0.5).half(), torch.full((8, 4096), 1.0).half()
    assert torch.equal(w8a8_linear(x, *to_int8(weight), None), torch.full((3, 8), 2048.0).half())


def test_4_bits_keep_16_steps_and_the_farthest_number_of_each_group():
    steps = torch.cat([torch.arange(-8, 8), torch.arange(-8, 8)]).float()  # one group
    weight = torch.stack([steps, steps.flip(0) * -0.25])
    packed, scale = to_int4(weight)
    assert packed.shape == (2, 16) and scale.flatten().tolist() == [1.0, -0.25]
    assert torch.equal(from_int4(packed, scale, 32), weight)


def test_4_bits_round_within_half_a_step_at_any_width():
    torch.manual_seed(0)
    weight = torch.randn(3, 40)
    packed, scale = to_int4(weight)
    again = from_int4(packed, scale, 40)
    step = scale.abs().repeat_interleave(32, 1)[:, :40]
    assert again.shape == weight.shape and bool(((again - weight).abs() <= 1.0001 * step).all())
    inside = weight / scale.repeat_interleave(32, 1)[:, :40] <= 7.5  # the opposite end has one step less
    assert bool(((again - weight).abs() <= 0.5001 * step)[inside].all())


def test_8_bit_floats_keep_three_bits_of_each_number():
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    numbers, scale = to_fp8(weight)
    again = numbers.view(torch.float8_e4m3fn).float() * scale
    large = weight.abs() > 0.02 * weight.abs().amax()
    assert bool(((again - weight).abs() <= weight.abs() / 16)[large].all())
