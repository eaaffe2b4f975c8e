"""A step of the training's own engine, DeepSpeed with ZeRO 1 and AdamW, started by torchrun on one device.

`python -m jobs.benchmark.gpu.training_step` is what torchrun starts: it prints one line of JSON.
"""

import contextlib
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import psutil
import torch

from jobs.benchmark.gpu.bench import Bench, Figures, Line
from jobs.benchmark.gpu.transformer import Shape, make_forward
from jobs.benchmark.timing import measure_seconds
from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.engine.deepspeed import Engine
from sana_model.nn.config import PRESETS
from sana_model.nn.transformer import SanaTransformer

SHAPES = (("sana-0.6b", 512, 16), ("sana-1.6b", 512, 16))
REPEATS = 5
LR = 1e-4


def training_step_lines(bench: Bench) -> list[Line]:
    lines = []
    for model, size, count in bench.some(SHAPES):
        shape = Shape(model=model, size=size, batch_size=count, training=True)
        name, run = f"{shape.name}, ZeRO 1, AdamW", partial(_measure, bench, shape)
        weight = bench.plan(gpu_s=30, cpu_s=60)
        lines.append(Line(section="A step with DeepSpeed", name=name, weight=weight, run=run, needs="deepspeed"))
    return lines


def _measure(bench: Bench, shape: Shape) -> Figures:
    bench.drop()  # the other process needs the memory
    whole = PRESETS[shape.model]
    depth, count, remark = bench.fit(
        whole.depth, shape.batch_size, 8 * shape.flops(whole, shape.batch_size), 5 * shape.rough_bytes(whole)
    )
    task = {"device": bench.device.type, "depth": depth, "shape": asdict(replace(shape, batch_size=count))}
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "jobs.benchmark.gpu.training_step"]
    command = [sys.executable, *program, json.dumps(task)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate()
    finally:
        if process.poll() is None:  # the line's time is over
            kill_family(process.pid)
            process.wait()
    if process.returncode:
        raise RuntimeError(f"torchrun ended with {process.returncode}: {errors.strip().splitlines()[-1][:150]}")
    told = json.loads(output.strip().splitlines()[-1])
    figures = bench.compute(told["seconds"], shape.flops(replace(whole, depth=depth), count), count)
    if bench.on_gpu:
        figures["peak_gib"] = told["peak_gib"]
    return Figures(values=figures, remark=remark)


def kill_family(pid: int) -> None:
    """Kill a process and its descendants, if it runs: torchrun's workers have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def run_steps(task: dict) -> dict[str, float]:
    """Train a model of random weights on random latents for a few steps; median seconds, and the peak of memory."""
    bench, shape = Bench(task["device"]), Shape(**task["shape"])
    torch.distributed.init_process_group("nccl" if bench.on_gpu else "gloo")
    bench.begin(float("inf"))
    with bench.device:
        model = SanaTransformer(replace(PRESETS[shape.model], depth=task["depth"]))
    engine = Engine(
        model,
        EngineConfig(zero_stage=1),
        OptimConfig(),
        micro_batch_size=shape.batch_size,
        grad_accum_steps=1,
        device=bench.device,
    )
    forward = make_forward(bench, engine.module, shape, peer=False)

    def step() -> None:
        engine.backward(forward().float().square().mean())
        engine.step(LR)

    step()
    seconds = statistics.median(measure_seconds(step, bench.device) for _ in range(REPEATS))
    torch.distributed.destroy_process_group()
    return {"seconds": seconds, **bench.peak()}


if __name__ == "__main__":
    print(json.dumps(run_steps(json.loads(sys.argv[1]))))
