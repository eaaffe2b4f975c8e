"""Upsampling by phases against the plain form."""

import pytest
import torch

from sana_model.kernels.upsample_conv import upsample_conv, upsample_conv_reference
from tests.support.peers import assert_close


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_upsampling_by_phases_equals_repeating_pixels(size, grad):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *size, generator=generator, requires_grad=grad)
    weight = torch.randn(4, 6, 3, 3, generator=generator, requires_grad=grad)
    bias = torch.randn(4, generator=generator, requires_grad=grad)
    ours, reference = upsample_conv(x, weight, bias), upsample_conv_reference(x, weight, bias)
    assert_close(ours, reference, 1e-5)
    if grad:
        upstream = torch.randn(ours.shape, generator=generator)
        for left, right in zip(
            torch.autograd.grad(ours, (x, weight, bias), upstream),
            torch.autograd.grad(reference, (x, weight, bias), upstream),
            strict=True,
        ):
            assert_close(left, right, 1e-5)
