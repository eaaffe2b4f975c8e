"""Interleaved timing of two ways to do the same work."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.benchmark.turns import in_turns
from jobs.common.text_table import format_table


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table: our way, the peer's way, and how often to time each."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    dtype: torch.dtype
    repeats: int
    forward: tuple[Callable[[], object], Callable[[], object]] | None = None
    """The forwards of a training step: its operations are counted as three times theirs, since torch miscounts the backward of
    grouped convolutions."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians in seconds, and the share of the device's `torch.mm` rate that each way reaches on the work it does."""

    name: str
    ours_s: float
    peer_s: float
    ours_share: float
    peer_share: float

    @property
    def ratio(self) -> float:
        return self.peer_s / self.ours_s


def time_entry(entry: Entry, device: torch.device) -> Timing:
    """Warm up, then time ours and the peer's in turns, so that what disturbs the machine disturbs both; medians."""
    for run in (entry.ours, entry.peer):
        run()
    flops = [count_flops(run) for run in entry.forward or (entry.ours, entry.peer)]
    flops = [3 * count for count in flops] if entry.forward else flops
    ways = {way: partial(measure_seconds, run, device) for way, run in (("ours", entry.ours), ("peer", entry.peer))}
    ours_s, peer_s = map(statistics.median, in_turns(ways, entry.repeats, label=entry.name).values())
    peak = measure_mm_peak(entry.dtype, device)
    return Timing(
        name=entry.name,
        ours_s=ours_s,
        peer_s=peer_s,
        ours_share=flops[0] / ours_s / peak,
        peer_share=flops[1] / peer_s / peak,
    )


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `run`; products by oneDNN included."""
    custom = {torch.ops.mkldnn._linear_pointwise: _onednn_flops} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        run()
    return counter.get_total_flops()


def _onednn_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    return 2 * out_shape.numel() * weight_shape[1]


@cache
def measure_mm_peak(dtype: torch.dtype, device: torch.device, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of torch.mm on square matrices, median; on a GPU larger ones. Measured once a process."""
    size = size * 4 if device.type == "cuda" else size
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(left, right)
    return 2 * size**3 / statistics.median(measure_seconds(lambda: torch.mm(left, right), device) for _ in range(repeats))


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    return measure_clocks(run, device).wall


class Clocks(NamedTuple):
    """Seconds that a call takes by the clock, and CPU seconds of this process with all its threads, which other work on the
    machine changes least."""

    wall: float
    cpu: float

    @classmethod
    def medians(cls, measured: Iterable["Clocks"]) -> "Clocks":
        return cls(*map(statistics.median, zip(*measured, strict=True)))


def measure_clocks(run: Callable[[], object], device: torch.device) -> Clocks:
    _wait(device)
    start = Clocks(time.perf_counter(), time.process_time())
    run()
    _wait(device)
    return Clocks(time.perf_counter() - start.wall, time.process_time() - start.cpu)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_timings(timings: list[Timing]) -> str:
    """A line for each entry."""
    columns = ["", "ours", "diffusers", "ratio", "ours/mm", "theirs/mm"]
    rows = [
        [
            timing.name,
            readable(timing.ours_s),
            readable(timing.peer_s),
            f"{timing.ratio:.2f}x",
            f"{timing.ours_share:.0%}",
            f"{timing.peer_share:.0%}",
        ]
        for timing in timings
    ]
    return format_table(columns, rows)


def readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
