"""The short run for a GPU: it ends in time, needs nothing that a GPU machine lacks, and leaves a page whatever happens."""

import json
import math
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from jobs.benchmark.gpu import clock
from jobs.benchmark.gpu.bench import Bench, Figures, Line, NotHere
from jobs.benchmark.gpu.clock import Budget, OutOfTime, time_limit
from jobs.benchmark.gpu.correctness import Part, check_part, make_parts, make_transformer
from jobs.benchmark.gpu.kernels import TABLE, Kernel, largest_error
from jobs.benchmark.gpu.memory import forecast_bytes
from jobs.benchmark.gpu.page import Entry, Page
from jobs.benchmark.gpu.run import make_lines, run_line
from jobs.benchmark.gpu.training_step import kill_family
from jobs.benchmark.gpu.transformer import Shape, measure_shape
from sana_model.nn.config import PRESETS

PROGRAM = """
import os, signal, sys, threading, time
from importlib.machinery import PathFinder
from pathlib import Path

ABSENT = {"ray", "diffusers", "deepspeed", "mlflow", "s3fs", "bitsandbytes", "came_pytorch", "faiss"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from jobs.benchmark import __main__ as benchmark

whole, cut = Path(sys.argv[1]), Path(sys.argv[2])
options = ["--device=cpu", "--sections=[ceilings,'transformer, forward: sana-0.6b, diffusers',fused]"]
assert benchmark.main(["gpu", "--minutes=1", f"--output_dir={whole}", *options]) == 0

def die():
    while "| torch.mm" not in (cut / "gpu.md").read_text():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)

cut.mkdir()
(cut / "gpu.md").touch()
threading.Thread(target=die, daemon=True).start()
benchmark.main(["gpu", "--minutes=1", f"--output_dir={cut}", *options])
"""


def test_it_runs_without_what_the_gpu_machine_lacks_and_a_kill_leaves_what_it_had(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = subprocess.run([sys.executable, "-c", PROGRAM, whole, cut], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]

    data = json.loads((whole / "gpu.json").read_text())
    assert data["status"].endswith("the run has ended") and "no diffusers" in data["facts"]["libraries"]
    lines = {(line["section"], line["name"]): line for line in data["lines"]}
    assert lines["Ceilings of the device", "copy"]["figures"]["gb_per_s"] > 0
    peer = lines["Transformer, forward: sana-0.6b, diffusers", "512 px, batch 1"]
    assert peer["state"] == "skipped" and peer["remark"] == "diffusers cannot be imported here"
    fused = [line for line in data["lines"] if line["section"] == "Fused kernels"]
    assert fused and all(line["state"] == "skipped" for line in fused)
    page = (whole / "gpu.md").read_text()
    assert all(f"## {section}" in page for section, _ in lines) and "| copy |" in page

    data, page = json.loads((cut / "gpu.json").read_text()), (cut / "gpu.md").read_text()
    assert data["lines"] and data["lines"][0]["figures"]["tflops"] > 0
    assert "at work on: " in page and "| torch.mm 1024 x 1024, bfloat16 |" in page


def test_the_order_is_that_of_what_is_worth_most() -> None:
    sections = list(dict.fromkeys(line.section.partition(":")[0] for line in make_lines(Bench("cpu"))))
    assert [section.partition(",")[0] for section in sections] == [
        "Start",
        "Correctness",
        "Ceilings of the device",
        "Transformer",
        "Transformer",
        "Transformer",
        "Fused kernels",
        "Sampling",
        "DC-AE",
        "DC-AE",
        "Text encoder",
        "A step with DeepSpeed",
        "Memory against the forecast",
    ]


def test_time_that_a_line_leaves_goes_to_those_after_it() -> None:
    budget = Budget(100.0, [1.0, 1.0, 2.0])
    assert budget.next_share() == pytest.approx(25.0, abs=0.1)  # and takes nothing
    assert budget.next_share() == pytest.approx(33.3, abs=0.1)
    assert budget.next_share() == pytest.approx(100.0, abs=0.1)


def test_a_short_line_gets_three_seconds_and_one_that_cannot_run_none() -> None:
    budget = Budget(100.0, [1.0, 0.0, 999.0])
    assert [budget.next_share(), budget.next_share()] == [3.0, 0.0]
    assert Budget(2.0, [1.0, 9.0]).next_share() == pytest.approx(2.0, abs=0.1)  # all that is left


def test_a_line_ends_with_its_time_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "AGAIN_S", 0.1)
    with pytest.raises(OutOfTime), time_limit(0.05):
        while True:
            time.sleep(0.01)

    def wait() -> Figures:
        try:
            time.sleep(30)
        except Exception:  # a compiler that takes every failure for its own
            return Figures()
        return Figures()

    def swallow() -> Figures:
        with suppress(BaseException):
            time.sleep(30)
        return wait()

    def unchecked() -> Figures:
        raise NotHere("no kernel has passed its check")

    def faulty() -> Figures:
        raise RuntimeError("no kernel image\nmore lines")

    bench = Bench("cpu")
    for run, seconds, state, remark in (
        (wait, 1.1, "skipped", "out of time after 1.1 s"),
        (wait, 0.5, "skipped", "out of time"),
        (swallow, 1.1, "skipped", "out of time after 1.1 s"),
        (unchecked, 5.0, "skipped", "no kernel has passed its check"),
        (faulty, 5.0, "failed", "RuntimeError: no kernel image"),
        (lambda: Figures(wrong=True, remark="beyond"), 5.0, "wrong", "beyond"),
    ):
        entry = run_line(Line(section="s", name="n", weight=1, run=run), bench, seconds)
        assert (entry.state, entry.remark) == (state, remark)


def test_every_part_passes_its_check() -> None:
    for part in make_parts(width=8):
        if part.name.startswith(("transformer", "four", "decode, dc-ae-lite")):  # the rest takes seconds each
            figures = check_part(Bench("cpu"), part)
            assert not figures.wrong and 0 < figures.values["bfloat16"] < 5e-2, (part.name, figures)


@pytest.mark.parametrize("damage", [0.5, float("nan")])
def test_a_wrong_result_is_marked_on_the_page(tmp_path: Path, damage: float) -> None:
    calls: list[int] = []

    def run(module: torch.nn.Module) -> torch.Tensor:
        calls.append(1)
        return torch.ones(3) if len(calls) == 1 else torch.ones(3) + damage

    figures = check_part(Bench("cpu"), Part(name="part", make=lambda: torch.nn.Linear(2, 2), run=run))
    assert figures.wrong and "float32 beyond 1e-04" in figures.remark
    page = Page(tmp_path, {}, 1)
    page.add(Entry(section="s", name="part", state="wrong", took_s=0, figures=figures.values, remark=figures.remark))
    page.write("the run has ended")
    assert "**Beyond its limit: part**" in (tmp_path / "gpu.md").read_text()
    (line,) = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)["lines"]
    assert line["figures"]["float32"] == (pytest.approx(damage) if damage == damage else None)


def test_a_kernel_is_compared_with_its_plain_form_and_a_single_nan_is_seen() -> None:
    for kernel in TABLE:
        inputs = kernel.inputs(2, 1, "sana-0.6b", torch.device("cpu"))
        before = [x.clone() for x in inputs]
        assert 0 < largest_error(kernel, inputs, torch.bfloat16) < 5e-2  # on a CPU the plain form, in 16 bits
        assert all(x.equal(y) for x, y in zip(inputs, before, strict=True))

        def damaged(x: torch.Tensor, *rest: torch.Tensor, kernel: Kernel = kernel) -> torch.Tensor:
            return kernel.plain(x, *rest) + 0 * (x.sum() - x.sum().detach()).sqrt()  # its gradient for x alone is NaN

        assert math.isnan(largest_error(replace(kernel, chosen=damaged), inputs, torch.float32))


def test_the_workers_of_torchrun_end_with_the_line_although_they_have_a_session_of_their_own() -> None:
    program = """
import subprocess
worker = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(worker.pid, flush=True)
worker.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    worker = psutil.Process(int(process.stdout.readline()))
    kill_family(process.pid)
    assert process.wait() == -signal.SIGKILL
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_shape_is_timed_and_has_its_share_of_the_ceiling() -> None:
    bench = Bench("cpu")
    bench.begin(0.01)
    figures = measure_shape(bench, Shape(model="sana-0.6b", size=64, batch_size=1, training=True), "eager")
    assert figures.remark == "depth 1 of 28, for the time and memory of this CPU"
    assert figures.values["seconds"] > 0
    assert figures.values["share"] == pytest.approx(figures.values["tflops"] * 1e12 / bench.mm_rate)


def test_memory_is_forecast_as_the_dry_run_of_a_training_does() -> None:
    shape = Shape(model="sana-0.6b", size=512, batch_size=4, training=True)
    config = replace(PRESETS["sana-0.6b"], depth=2)
    kept, recomputed = (forecast_bytes(config, shape, every) for every in (0, 1))
    weights = sum(weight.numel() for weight in make_transformer(1).parameters())
    assert 4 * weights < recomputed < kept < 3 * 4 * weights


def test_a_cpu_gets_fewer_blocks_and_then_fewer_samples() -> None:
    bench, whole = Bench("cpu"), PRESETS["sana-1.6b"]
    shape = Shape(model="sana-1.6b", size=1024, batch_size=64, training=True)
    flops = shape.flops(whole, 64)
    assert flops == pytest.approx(6 * 64 * 1.48e12, rel=0.1)  # the published count, with 300 caption tokens in place of 60
    bench.line_seconds = float("inf")
    assert bench.fit(20, 64, 0.0, 0.0) == (2, 64, "depth 2 of 20, for the time and memory of this CPU")
    depth, batch, remark = bench.fit(20, 64, 0.0, 1e15)
    assert depth == 1 and batch < 64 and remark == f"depth 1 of 20, batch {batch} of 64, for the time and memory of this CPU"
