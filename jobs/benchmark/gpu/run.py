"""Runs the lines one after the other, each within its share of the time, and writes the page as it goes."""

import platform
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from tqdm import tqdm

from jobs.benchmark.config import GpuConfig
from jobs.benchmark.gpu.autoencoder import autoencoder_lines
from jobs.benchmark.gpu.bench import DTYPES, GIB, Bench, Figures, Line, NotHere
from jobs.benchmark.gpu.ceilings import ceiling_lines
from jobs.benchmark.gpu.clock import SHORTEST_S, Budget, OutOfTime, time_limit
from jobs.benchmark.gpu.correctness import correctness_lines
from jobs.benchmark.gpu.kernels import kernel_lines
from jobs.benchmark.gpu.memory import memory_lines
from jobs.benchmark.gpu.page import Entry, Page, State, format_section
from jobs.benchmark.gpu.text import text_lines
from jobs.benchmark.gpu.training_step import training_step_lines
from jobs.benchmark.gpu.transformer import sampling_lines, transformer_lines
from jobs.benchmark.timing import measure_seconds
from pipelines.workers.halving import is_out_of_memory

LIBRARIES = ("torch", "triton", "transformers", "diffusers", "deepspeed")


def benchmark_gpu(config: GpuConfig) -> None:
    """Measure everything within `config.minutes`; a run that is cut off leaves the page of what it had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no CUDA device here; --device cpu runs the same lines with smaller shapes")
    bench = Bench(config.device)
    lines = make_lines(bench)
    if config.sections:
        lines = [line for line in lines if any(line.section.lower().startswith(part.lower()) for part in config.sections)]
    if not lines:
        known = list(dict.fromkeys(line.section for line in make_lines(bench)))
        raise ValueError(f"sections={config.sections}: no section begins so; there are {', '.join(known)}")
    page = Page(Path(config.output_dir), describe_machine(bench) | {"minutes": f"{config.minutes:g}"}, len(lines))
    budget = Budget(config.minutes * 60, [0.0 if find_obstacle(line, bench) else line.weight for line in lines])
    section = ""
    for line in tqdm(lines, desc="lines", file=sys.stderr, dynamic_ncols=True):
        page.write(f"at work on: {line.section}, {line.name}")
        entry = run_line(line, bench, budget.next_share())
        page.add(entry)
        if line.section != section:
            section = line.section
            tqdm.write(f"\n{section}", file=sys.stdout)
        tqdm.write(format_section([entry])[-1], file=sys.stdout)
        if bench.on_gpu and entry.state == "failed" and (reason := find_device_error()):
            page.write(f"the device failed: {reason}")
            raise RuntimeError(f"the device failed in {line.section}, {line.name}: {reason}; the page has what came before")
    page.write("the run has ended")
    print(f"\nwritten: {page.folder / 'gpu.md'}, {page.folder / 'gpu.json'}")


def make_lines(bench: Bench) -> list[Line]:
    """All lines in their order: what is worth most comes first, in case the run is cut off."""
    return [
        Line(section="Start", name="CUDA is awake", weight=20, run=partial(wake_device, bench), only_gpu=True),
        Line(section="Start", name="diffusers is imported", weight=15, run=import_diffusers, needs="diffusers"),
        *correctness_lines(bench),
        *ceiling_lines(bench),
        *transformer_lines(bench),
        *kernel_lines(bench),
        *sampling_lines(bench),
        *autoencoder_lines(bench),
        *text_lines(bench),
        *training_step_lines(bench),
        *memory_lines(bench),
    ]


def wake_device(bench: Bench) -> Figures:
    """A product, a convolution and an attention in each dtype, so that no later line pays for loading CUDA's libraries."""

    def run() -> None:
        for dtype in DTYPES:
            x = torch.randn(2, 64, 64, 64, device=bench.device, dtype=dtype)
            torch.mm(x[0, 0], x[0, 1])
            F.conv2d(x, x[0, :, :3, :3].expand(64, -1, -1, -1), padding=1)
            F.scaled_dot_product_attention(x, x, x)

    return Figures(values={"seconds": measure_seconds(run, bench.device)})


def import_diffusers() -> Figures:
    """Import it at once, so that no later line pays for it: it takes seconds."""
    start = time.monotonic()
    import jobs.benchmark.model  # noqa: F401

    return Figures(values={"seconds": time.monotonic() - start})


def find_obstacle(line: Line, bench: Bench) -> str:
    """Why a line cannot run on this machine; "" if it can."""
    if line.only_gpu and not bench.on_gpu:
        return "only on a GPU"
    if line.needs and find_spec(line.needs) is None:
        return f"{line.needs} cannot be imported here"
    return ""


def run_line(line: Line, bench: Bench, seconds: float) -> Entry:
    """Run one line; whatever goes wrong is told in its entry, and the next one goes on."""
    start = time.monotonic()
    problem: tuple[State, str]

    def entry(state: State, figures: Figures) -> Entry:
        took = time.monotonic() - start
        return Entry(
            section=line.section, name=line.name, state=state, took_s=took, figures=figures.values, remark=figures.remark
        )

    if obstacle := find_obstacle(line, bench):
        return entry("skipped", Figures(remark=obstacle))
    if seconds < SHORTEST_S:
        return entry("skipped", Figures(remark="out of time"))
    bench.begin(seconds)
    try:
        with time_limit(seconds):
            figures = line.run()
        return entry("wrong" if figures.wrong else "done", figures)
    except OutOfTime:
        problem = "skipped", f"out of time after {seconds:.1f} s"
    except NotHere as reason:
        problem = "skipped", str(reason)
    except Exception as error:
        problem = (
            "failed",
            "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0][:200],
        )
    with suppress(RuntimeError):  # of a device that failed
        bench.drop()  # outside the handlers, whose traceback holds the tensors
    return entry(problem[0], Figures(values=bench.so_far, remark=problem[1]))


def find_device_error() -> str:
    """Why this process can use the GPU no more; "" if it can."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def describe_machine(bench: Bench) -> dict[str, str]:
    """Date, device, memory and versions."""
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        device = (
            f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
        device += f", CUDA {torch.version.cuda}"
    else:
        free = psutil.virtual_memory().available / GIB
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {free:.0f} GiB free"
    found = [f"{name} {version(name)}" if find_spec(name) else f"no {name}" for name in LIBRARIES]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "libraries": f"Python {platform.python_version()}, {', '.join(found)}",
        "dtype": "bfloat16 where a line names none",
    }
