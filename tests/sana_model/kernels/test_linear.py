"""The oneDNN layer against `F.linear`."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sana_model.kernels.linear import SMALLEST_WEIGHT, Linear
from tests.support.peers import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_linear_equals_torch_forward_and_backward(dtype, bias):
    torch.manual_seed(0)
    layer = Linear(192, 160, bias=bias, dtype=dtype)
    assert layer.weight.numel() >= SMALLEST_WEIGHT
    x = torch.randn(2, 5, 192, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 160, dtype=dtype)
    plain = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    wanted = torch.autograd.grad(plain, [x, *layer.parameters()], grad.float())
    result = layer(x)
    got = torch.autograd.grad(result, [x, *layer.parameters()], grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert result.dtype == dtype and result.grad_fn is not None
    assert_close(result.float(), plain, tolerance)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours.float(), theirs.float(), tolerance)


def test_onednn_linear_gives_a_lone_bias_its_gradient():
    layer = Linear(192, 160)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 192)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((160,), 4.0))


def test_onednn_linear_refuses_second_derivatives_rather_than_get_them_wrong():
    layer, x = Linear(192, 160), torch.randn(4, 192, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_onednn_linear_serves_no_rows_and_function_transforms():
    layer = Linear(192, 160)
    layer(torch.randn(0, 192, requires_grad=True)).sum().backward()
    x = torch.randn(5, 192)
    assert_close(torch.func.vmap(layer)(x).detach(), layer(x).detach(), 1e-5)


def test_bfloat16_works_on_a_processor_without_it():
    program = (
        "import torch; from sana_model.kernels.linear import Linear;"
        "print(Linear(192, 160, dtype=torch.bfloat16)(torch.ones(2, 192, dtype=torch.bfloat16)).shape)"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "[2, 160]" in run.stdout, run.stderr[-1000:]
