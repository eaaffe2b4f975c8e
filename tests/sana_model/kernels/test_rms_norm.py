"""RMSNorm in chunks against its definition in float64."""

import pytest
import torch
from torch import Tensor

from sana_model.kernels import rms_norm as module
from sana_model.kernels.rms_norm import plain_rms_norm, rms_norm
from sana_model.nn.autoencoder import DCAutoencoder
from tests.support.peers import assert_close, scramble


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 7, 32)])
def test_result_and_gradients_are_the_definitions(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 96)  # three rows of 32
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))

    def pass_through(inputs: list[Tensor], normalize: object, grad: Tensor) -> list[Tensor]:
        given = [one.requires_grad_() for one in inputs]
        normed = normalize(*given, 1e-5)  # type: ignore[operator]
        return [normed.detach(), *torch.autograd.grad(normed, given, grad)]

    def define(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    ours = pass_through(
        [x.clone(), weight.clone(), bias.clone()], rms_norm, upstream.transpose(0, 1).contiguous().transpose(0, 1)
    )
    truth = pass_through([x.double(), weight.double(), bias.double()], define, upstream.double())
    for left, right in zip(ours, truth, strict=True):
        assert left.dtype == dtype
        assert_close(left.double(), right, tolerance)
    with torch.no_grad():
        assert torch.equal(plain_rms_norm(x.clone(), weight, bias, 1e-5), ours[0])


def test_parts_without_gradients_change_none_of_the_others() -> None:
    model, image = scramble(DCAutoencoder.from_preset("tiny")), torch.rand(1, 3, 32, 32)
    head = list(model.decoder.conv_out.parameters())
    whole = torch.autograd.grad(model.decode(model.encode(image)).square().mean(), head)
    model.requires_grad_(False)
    model.decoder.conv_out.requires_grad_(True)
    for left, right in zip(torch.autograd.grad(model.decode(model.encode(image)).square().mean(), head), whole, strict=True):
        assert_close(left, right, 1e-5)
