"""The Triton kernels against their plain forms, run by Triton's interpreter on the CPU, and when they are chosen."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sana_model.kernels import fused
from sana_model.kernels.linear_attention import EPS, plain_linear_attention, relu_linear_attention
from sana_model.kernels.mix_ffn import plain_silu_depthwise_gate
from sana_model.kernels.modulate import plain_modulate
from tests.support.peers import assert_close

needs_triton = pytest.mark.skipif(not fused.has_triton(), reason="Triton is not installed: make test-kernels")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Function = Callable[..., Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(kernel: Function, plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compare results and the gradients of all inputs with those of the plain form, computed in float32."""
    own = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in own]
    ours, wanted = kernel(*own), plain(*exact)
    assert ours.dtype == dtype
    assert_close(ours.float(), wanted, DTYPES[dtype])
    upstream = draw(*wanted.shape, seed=9)
    gradients = torch.autograd.grad(ours, own, upstream.to(dtype))
    for got, correct in zip(gradients, torch.autograd.grad(wanted, exact, upstream.to(dtype).float()), strict=True):
        assert got.dtype == dtype
        assert_close(got.float(), correct, DTYPES[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 16), (2, 37, 3, 32), (1, 130, 2, 32)])
def test_linear_attention(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    from sana_model.kernels.triton_attention import fused_linear_attention

    packed = draw(*size[:3], 3 * size[3], seed=0)

    def kernel(packed: Tensor) -> Tensor:
        return fused_linear_attention(*packed.chunk(3, dim=-1), EPS)  # strided views, as DC-AE has them

    if size[1] == 1:
        packed = packed.abs()  # with one token that has no positive key, everything is zero
    check(kernel, lambda packed: plain_linear_attention(*packed.chunk(3, dim=-1)), [packed], dtype)


@needs_triton
def test_linear_attention_keeps_zeros_and_nan() -> None:
    from sana_model.kernels.triton_attention import fused_linear_attention

    query, key, value = (draw(1, 5, 2, 16, seed=seed) for seed in range(3))
    query[0, 1], query[0, 2, 0, 0] = -1.0, float("nan")
    ours, plain = fused_linear_attention(query, key, value, EPS), plain_linear_attention(query, key, value)
    assert torch.equal(ours[0, 1], torch.zeros(2, 16)) and bool(ours[0, 2, 0].isnan().all())
    torch.testing.assert_close(ours, plain, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 3), (2, 5, 9, 5), (1, 11, 7, 66)])
def test_mix_ffn(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    from sana_model.kernels.triton_mix_ffn import fused_silu_depthwise_gate

    hidden = size[3]
    inputs = [draw(*size[:3], 2 * hidden, seed=0), draw(2 * hidden, 1, 3, 3, seed=1), draw(2 * hidden, seed=2)]
    check(fused_silu_depthwise_gate, plain_silu_depthwise_gate, inputs, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 5), (3, 7, 96), (2, 3, 1152)])
def test_modulated_layer_norm(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    from sana_model.kernels.triton_modulate import fused_modulate

    modulation = draw(size[0], 6, size[2], seed=1)

    def kernel(tokens: Tensor, modulation: Tensor) -> Tensor:
        return fused_modulate(tokens, *modulation[:, 1:3].chunk(2, dim=1), 1e-6)

    def plain(tokens: Tensor, modulation: Tensor) -> Tensor:
        return plain_modulate(tokens, *modulation[:, 1:3].chunk(2, dim=1))

    check(kernel, plain, [draw(*size, seed=0) + 3, modulation], dtype)


def test_no_kernel_is_chosen_on_the_cpu_or_unless_it_is_turned_on() -> None:
    query, key, value = (draw(1, 5, 2, 32, seed=seed) for seed in range(3))
    with fused.fused_kernels(["all"]):
        assert not fused.serves("attention", query, key, value)
        assert torch.equal(relu_linear_attention(query, key, value), plain_linear_attention(query, key, value))
    assert fused.parse_kernels("") == fused.parse_kernels("none") == frozenset()
    assert fused.parse_kernels("all") == {"attention", "mix_ffn", "layer_norm"}
    with pytest.raises(ValueError, match=r"SANA_FUSED_KERNELS='attention,atention': unknown atention; choose from attention"):
        fused.parse_kernels("attention,atention")


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_hopper_without_a_card() -> None:
    """To machine code of compute capability 9.0, at the published widths, in bfloat16, float16 and float32."""
    program = "from tests.support.compile_kernels import compile_all; compile_all()"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    spilled = [int(line.partition(" bytes spilled")[0].split()[-1]) for line in lines]
    assert len(spilled) == 27 and max(spilled) < 512, run.stdout  # values of a thread that did not fit into its registers
