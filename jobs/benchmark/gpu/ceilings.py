"""What the device itself can do: products of matrices and copies of memory."""

from functools import cache, partial

import torch

from jobs.benchmark.gpu.bench import Bench, Figures, Line, mm_side
from jobs.benchmark.timing import measure_mm_peak, measure_seconds
from sana_model.nn.finite import name_dtype

SECTION = "Ceilings of the device"


def ceiling_lines(bench: Bench) -> list[Line]:
    def multiply(dtype: torch.dtype) -> Figures:
        return Figures(values={"tflops": measure_mm_peak(dtype, bench.device, mm_side(bench.device)) / 1e12})

    def copy() -> Figures:
        return Figures(values={"gb_per_s": measure_copy_rate(bench.device) / 1e9}, remark="bytes read and written")

    side = mm_side(bench.device) * (4 if bench.on_gpu else 1)
    products = [
        Line(
            section=SECTION,
            name=f"torch.mm {side} x {side}, {name_dtype(dtype)}",
            weight=bench.plan(gpu_s=2, cpu_s=4),
            run=partial(multiply, dtype),
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        if bench.on_gpu or dtype != torch.float16  # which CPUs multiply without care
    ]
    return [*products, Line(section=SECTION, name="copy", weight=bench.plan(gpu_s=2, cpu_s=4), run=copy)]


@cache
def measure_copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of several copies that no cache holds. Measured once a process."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(measure_seconds(lambda: target.copy_(source), device) for _ in range(7))
