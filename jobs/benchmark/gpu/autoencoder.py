"""DC-AE f32c32-sana-1.1: encode and decode, upsampling by phases or plainly, and its convolutions in both memory layouts."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from jobs.benchmark.gpu.bench import NEEDS, Bench, Figures, Line
from jobs.benchmark.gpu.kernels import passed_kernels
from jobs.benchmark.timing import count_flops
from sana_model.kernels.fused import fused_kernels
from sana_model.kernels.upsample_conv import upsample_conv_reference
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.autoencoder_blocks import ResBlock

PRESET = "dc-ae-f32c32-sana-1.1"
CPU_SIZE = 64
WAYS = (
    ("encode", "eager"),
    ("encode", "fused kernels"),
    ("decode", "phases"),
    ("decode", "plain upsampling"),
    ("decode", "fused kernels"),
    ("encode", "diffusers"),
    ("decode", "diffusers"),
)
"""What is computed, and how; each model is made once."""


def autoencoder_lines(bench: Bench) -> list[Line]:
    shapes = ((512, 16), (1024, 1), (1024, 4)) if bench.on_gpu else ((CPU_SIZE, 1),)
    remark = "" if bench.on_gpu else f"{CPU_SIZE} px only, for the time of this CPU"
    lines = []
    for what, way in WAYS:
        for size, count in shapes:
            lines.append(
                Line(
                    section="DC-AE",
                    name=f"{what}, {size} px batch {count}, {way}",
                    weight=bench.plan(gpu_s=4, cpu_s=12),
                    run=partial(_measure, bench, what, way, size, count, remark),
                    only_gpu=way == "fused kernels",
                    needs=NEEDS.get(way, ""),
                )
            )
    for channels, size in ((128, 512), (256, 256), (512, 128)):
        for layout in ("channels last", "channels first"):
            run = partial(_measure_block, bench, channels, size, layout)
            name = f"residual block of {channels} channels, {size} x {size}, {layout}"
            lines.append(Line(section="DC-AE, memory layouts", name=name, weight=2, run=run))
    return lines


def _measure(bench: Bench, what: str, way: str, size: int, count: int, remark: str) -> Figures:
    kernels, left_out = passed_kernels() if way == "fused kernels" else ([], "")
    model = bench.keep(("DC-AE", way == "diffusers"), lambda: _make(bench, peer=way == "diffusers"))
    bench.forget_peak()
    if what == "encode":
        given = torch.rand(count, 3, size, size, device=bench.device, dtype=bench.dtype) * 2 - 1
    else:
        given = torch.randn(count, 32, size // 32, size // 32, device=bench.device, dtype=bench.dtype)
    run = torch.no_grad()(lambda: getattr(model, what)(given))
    plainly = patch("sana_model.nn.autoencoder_blocks.upsample_conv", upsample_conv_reference)
    with plainly if way == "plain upsampling" else nullcontext(), fused_kernels(kernels):
        flops = count_flops(run)  # which warms it up
        seconds = bench.measure(run, warm=bench.on_gpu)
    return Figures(values=bench.compute(seconds, flops, count), remark=remark or left_out)


def _make(bench: Bench, *, peer: bool) -> Any:
    with bench.device:
        if peer:
            from jobs.benchmark.model import make_peer_autoencoder

            return make_peer_autoencoder(1.0).to(bench.dtype).eval()
        return DCAutoencoder.from_preset(PRESET).to(bench.dtype).eval()


def _measure_block(bench: Bench, channels: int, size: int, layout: str) -> Figures:
    size, remark = (size, "") if bench.on_gpu else (size // 4, f"{size // 4} x {size // 4}, for the time of this CPU")
    memory = torch.channels_last if layout == "channels last" else torch.contiguous_format
    with bench.device:
        block: Any = ResBlock(channels, batch_norm=False)
        x = torch.randn(1, channels, size, size)
    block = block.to(bench.dtype).to(memory_format=memory)
    x = x.to(bench.dtype).contiguous(memory_format=memory)
    run: Callable[[], object] = torch.no_grad()(lambda: block(x))
    flops = count_flops(run)
    return Figures(values=bench.compute(bench.measure(run), flops, 1), remark=remark)
