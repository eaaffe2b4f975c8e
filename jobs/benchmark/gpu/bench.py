"""What every line uses: the device, its ceilings, timing within the line's time, and models kept from line to line."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from jobs.benchmark.timing import measure_mm_peak, measure_seconds
from sana_model.nn.finite import name_dtype

GIB = 2**30
MOST_REPEATS = 10
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error of a correct result, wide enough for a few layers: bfloat16 has 8 bits, float16 11."""
NEEDS = {"diffusers": "diffusers", "fused kernels": "triton", "compiled": "triton"}
"""The module that a way to compute needs; other ways need none."""
CPU_SHARE = 0.25
"""Of a line's time that one run may take on a CPU, by forecast: there is a warm-up too, and models are to be made."""
MOST_CPU_BLOCKS = 2
"""Making more of them takes a CPU longer than running them, and they are all alike."""
Model = TypeVar("Model")
Choice = TypeVar("Choice")


class NotHere(Exception):
    """A line cannot be measured on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The result of a line: figures by the names of `page.COLUMNS`, a remark, and whether a limit was passed."""

    values: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""
    wrong: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measurement. weight: seconds that it is planned to take; run: does it, within the bench's time.

    only_gpu: it means nothing on a CPU, and gets no time there. needs: a module without which it gets none either.
    """

    section: str
    name: str
    weight: float
    run: Callable[[], Figures]
    only_gpu: bool = False
    needs: str = ""


class Bench:
    """The device and the time of the current line.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str):
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.on_gpu = device == "cuda"
        self.dtype = torch.bfloat16
        self.line_end, self.line_seconds = float("inf"), float("inf")
        self.so_far: dict[str, float] = {}  # figures of the line that stay if its time ends
        self._kept: tuple[Hashable, Any] | None = None

    def plan(self, *, gpu_s: float, cpu_s: float) -> float:
        """The weight of a line: seconds on an H200, or on two cores."""
        return gpu_s if self.on_gpu else cpu_s

    @property
    def mm_rate(self) -> float:
        """FLOP/s of the device's own torch.mm in the bench's dtype."""
        return measure_mm_peak(self.dtype, self.device, mm_side(self.device))

    def some(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """Models or batches: on a CPU the first alone, since the others would be cut to much the same work."""
        return choices if self.on_gpu else choices[:1]

    def begin(self, seconds: float) -> None:
        """A line begins, which may take so long."""
        self.line_end, self.line_seconds = time.monotonic() + seconds, seconds
        self.so_far = {}
        self.forget_peak()

    def measure(self, run: Callable[[], object], *, warm: bool = True) -> float:
        """Median seconds of `run` after a warm-up, with ten repeats if three quarters of the line's time allow."""
        if warm:
            run()
        seconds = [measure_seconds(run, self.device)]
        while len(seconds) < MOST_REPEATS and self.line_end - time.monotonic() > self.line_seconds / 4 + seconds[-1]:
            seconds.append(measure_seconds(run, self.device))
        return statistics.median(seconds)

    def keep(self, key: Hashable, make: Callable[[], Model]) -> Model:
        """What `make` returns, kept until another key comes: lines on the same model follow each other."""
        if self._kept is None or self._kept[0] != key:
            self.drop()
            self._kept = key, make()
        return self._kept[1]

    def drop(self) -> None:
        """Free the model that is kept."""
        self._kept = None
        if self.on_gpu:
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        """Count the peak of memory from now on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """The most that tensors took in the current line, or since `forget_peak`; nothing on a CPU, where nobody counts."""
        return {"peak_gib": torch.cuda.max_memory_allocated() / GIB} if self.on_gpu else {}

    def compute(self, seconds: float, flops: float, images: int) -> dict[str, float]:
        """The figures of work that multiplies matrices, and its share of the device's own torch.mm."""
        rate = flops / seconds
        figures = {"seconds": seconds, "images_per_s": images / seconds, "tflops": rate / 1e12, "share": rate / self.mm_rate}
        return figures | self.peak()

    def fit(self, depth: int, batch_size: int, flops: float, num_bytes: float) -> tuple[int, int, str]:
        """Depth and batch that the device can bear, and a remark if they are not those asked for: a GPU bears all.

        On a CPU first blocks go, then samples, by the line's time and by half of the memory that is free.

        Args:
            flops, num_bytes: what a run at the full depth and batch takes.
        """
        if self.on_gpu:
            return depth, batch_size, ""
        too_slow = flops / self.mm_rate / (CPU_SHARE * self.line_seconds)
        cut = max(too_slow, num_bytes / (psutil.virtual_memory().available / 2), 1.0)
        fitted_depth = max(min(int(depth / cut), MOST_CPU_BLOCKS), 1)
        fitted_batch = max(int(batch_size * depth / cut / fitted_depth), 1)
        fitted_batch = min(fitted_batch, batch_size)
        cuts = [f"depth {fitted_depth} of {depth}"] if fitted_depth < depth else []
        cuts += [f"batch {fitted_batch} of {batch_size}"] if fitted_batch < batch_size else []
        return fitted_depth, fitted_batch, ", ".join([*cuts, "for the time and memory of this CPU"] if cuts else [])


def mm_side(device: torch.device) -> int:
    """Side of the matrices of `torch.mm` whose rate is the ceiling."""
    return 2048 if device.type == "cuda" else 1024  # timing.measure_mm_peak takes four times as much on a GPU


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, on its device."""
    exact = exact.detach().double()
    return float((result.detach().to(exact.device).double() - exact).norm() / exact.norm())


def judge(errors: Mapping[str, float]) -> Figures:
    """Errors by dtype, and whether any is beyond its limit (NaN is)."""
    limits = {name_dtype(dtype): limit for dtype, limit in DTYPES.items()}
    bad = [name for name, error in errors.items() if not error <= limits[name]]
    return Figures(values=errors, remark=", ".join(f"{name} beyond {limits[name]:.0e}" for name in bad), wrong=bool(bad))
