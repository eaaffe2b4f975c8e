"""The transformer at the published shapes: forward, forward and backward, and 20 steps of sampling, in several ways."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.benchmark.gpu.bench import NEEDS, Bench, Figures, Line
from jobs.benchmark.gpu.kernels import passed_kernels
from jobs.benchmark.inputs import CAPTION_TOKENS, FLOW_SHIFT, GUIDANCE_SCALE, NUM_STEPS, make_captions
from pipelines.train.meter import step_flops
from pipelines.workers.halving import is_out_of_memory
from sana_model.guidance import guided_velocity
from sana_model.kernels.fused import fused_kernels
from sana_model.nn.config import PRESETS, SanaConfig
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import CaptionTokens
from sana_model.solver import flow_dpm_solver, sampling_sigmas

Run = Callable[[], object]
MODELS = ("sana-0.6b", "sana-1.6b")
SIZES = (512, 1024)
WAYS = {
    "eager": (1, 16, 64),
    "fused kernels": (1, 16, 64),
    "CUDA graph": (1, 16),
    "compiled": (16,),
    "diffusers": (1, 16, 64),
}
"""Ways to compute, and the batches of each. One model serves all ways but the last."""
ONLY_GPU = ("fused kernels", "CUDA graph", "compiled")
PLANNED_RATE = 3e14
"""FLOP/s of an H200 that the division of the time counts on."""
EXTRA_S = {"compiled": 25, "fused kernels": 3}
"""Seconds that a way takes besides its runs, for compilers; other ways take 1.5."""
WARM_UPS = 3  # before a CUDA graph is captured, as torch's manual has it


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Work of a transformer. size: side of the pictures in pixels."""

    model: str
    size: int
    batch_size: int
    training: bool

    @property
    def name(self) -> str:
        return f"{self.model} {self.size} px batch {self.batch_size}"

    def flops(self, config: SanaConfig, batch_size: int) -> float:
        """Of a forward, or of a forward and backward pass."""
        tokens = (self.size // 32) ** 2
        whole = step_flops(config, batch_size=batch_size, image_tokens=tokens, caption_tokens=CAPTION_TOKENS)
        return whole if self.training else whole / 3

    def rough_bytes(self, config: SanaConfig) -> float:
        """Weights and activations in 16 bits, within a factor of two: what a CPU must have."""
        tokens = self.batch_size * (self.size // 32) ** 2
        wide = 12 * config.ffn_dim + 24 * config.dim
        kept = config.depth if self.training else 1
        weights = config.depth * (2 + 2 * self.training) * (3 * config.ffn_dim * config.dim + 8 * config.dim**2)
        return weights + 2.0 * tokens * wide * kept


def transformer_lines(bench: Bench) -> list[Line]:
    """Model by model, so that each is made once, on a GPU in a line of its own: the others are short."""
    lines = []
    for model in bench.some(MODELS):
        for way, batches in WAYS.items():
            lines += _first_lines(bench, model, way)
            for training in (False, True):
                for size in SIZES:
                    for batch_size in bench.some(batches):
                        shape = Shape(model=model, size=size, batch_size=batch_size, training=training)
                        lines.append(_line(bench, shape, way))
    return lines


def _first_lines(bench: Bench, model: str, way: str) -> list[Line]:
    """What the first of a way's lines would pay for otherwise."""
    if way in ("eager", "diffusers"):
        name, weight, run = "the model", 8, partial(make_whole_model, bench, model, way)
    elif way in EXTRA_S:
        shape = Shape(model=model, size=512, batch_size=16, training=True)
        name, weight, run = "by the compilers, and run", 30, partial(wake_compilers, bench, shape, way)
    else:
        return []
    section = f"Transformer, made on the device: {model}, {way}"
    return [Line(section=section, name=name, weight=weight, run=run, only_gpu=True, needs=NEEDS.get(way, ""))]


def wake_compilers(bench: Bench, shape: Shape, way: str) -> Figures:
    """Measure a shape; the figure is the time that all of it takes."""
    start = time.perf_counter()
    remark = measure_shape(bench, shape, way).remark
    return Figures(values={"seconds": time.perf_counter() - start}, remark=remark)


def make_whole_model(bench: Bench, name: str, way: str) -> Figures:
    """Make the model that the lines of the next ways use."""
    config, start = PRESETS[name], time.perf_counter()
    bench.keep((way == "diffusers", config), lambda: make_model(bench, config, peer=way == "diffusers"))
    return Figures(values={"seconds": time.perf_counter() - start, **bench.peak()})


def _line(bench: Bench, shape: Shape, way: str) -> Line:
    section = "Transformer, forward and backward" if shape.training else "Transformer, forward"
    few_runs = 4 * shape.flops(PRESETS[shape.model], shape.batch_size) / PLANNED_RATE
    return Line(
        section=f"{section}: {shape.model}, {way}",
        name=f"{shape.size} px, batch {shape.batch_size}",
        weight=bench.plan(gpu_s=EXTRA_S.get(way, 1.5) + few_runs, cpu_s=8),
        run=partial(measure_shape, bench, shape, way),
        only_gpu=way in ONLY_GPU,
        needs=NEEDS.get(way, ""),
    )


def measure_shape(bench: Bench, shape: Shape, way: str) -> Figures:
    """Time a shape in a way; a batch for which a GPU's memory is not enough is halved until it is."""
    kernels, left_out = passed_kernels() if way == "fused kernels" else ([], "")
    whole = PRESETS[shape.model]
    depth, batch_size, remark = bench.fit(
        whole.depth, shape.batch_size, shape.flops(whole, shape.batch_size), shape.rough_bytes(whole)
    )
    config = replace(whole, depth=depth)
    while True:
        try:
            with fused_kernels(kernels):
                seconds = _time(bench, config, replace(shape, batch_size=batch_size), way)
            values = bench.compute(seconds, shape.flops(config, batch_size), batch_size)
            return Figures(values=values, remark=", ".join(part for part in (remark, left_out) if part))
        except RuntimeError as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
        bench.drop()
        remark, batch_size = f"batch {batch_size // 2}: no memory for {batch_size}", batch_size // 2


def _time(bench: Bench, config: SanaConfig, shape: Shape, way: str) -> float:
    model = bench.keep((way == "diffusers", config), lambda: make_model(bench, config, peer=way == "diffusers"))
    model.zero_grad(set_to_none=True)
    bench.forget_peak()  # of making the model, of earlier gradients, of a batch that was too large
    run = make_run(bench, model, shape, peer=way == "diffusers")
    if way == "CUDA graph":
        return bench.measure(capture(run).replay)
    if way == "compiled":
        bench.drop()  # the next line gets a model that is not compiled
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(dynamic=False)  # as `engine.compile_blocks` of a training does, for one shape only
    return bench.measure(run)


def make_model(bench: Bench, config: SanaConfig, *, peer: bool) -> Any:
    """A transformer of random weights, made on the device: ours, or diffusers'."""
    with bench.device:
        if peer:
            from jobs.benchmark.model import make_peer_transformer

            return make_peer_transformer(config).to(bench.dtype)
        return SanaTransformer(config).to(bench.dtype)


def make_run(bench: Bench, model: Any, shape: Shape, *, peer: bool) -> Run:
    """A forward pass without gradients, or a forward and backward pass that leaves the gradients of all weights."""
    forward = make_forward(bench, model, shape, peer=peer)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()

    return train if shape.training else torch.no_grad()(forward)


def make_forward(bench: Bench, model: Any, shape: Shape, *, peer: bool) -> Callable[[], Tensor]:
    """A forward pass on random inputs.

    Captions have 60 real tokens. Ours get only these, as the training's stream packs them; diffusers computes all 300.
    """
    size, count = shape.size // 32, shape.batch_size
    latents = torch.randn(count, 32, size, size, device=bench.device, dtype=bench.dtype)
    timestep = torch.full((count,), 500.0, device=bench.device)
    embeds, mask = make_captions(count, bench.device, bench.dtype)
    packed, positions = embeds[:, :CAPTION_TOKENS].flatten(0, 1), torch.arange(count * CAPTION_TOKENS, device=bench.device)

    def forward() -> Tensor:
        if peer:
            from jobs.benchmark.model import run_peer_transformer

            return run_peer_transformer(model, latents, timestep, embeds, mask)
        caption = CaptionTokens(model.caption_proj(packed), positions, None, count, CAPTION_TOKENS)
        return model(latents, timestep, caption)

    return forward


def capture(run: Run) -> torch.cuda.CUDAGraph:
    """Record `run` as a CUDA graph, after warming up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def sampling_lines(bench: Bench) -> list[Line]:
    """20 steps of Flow-DPM-Solver with guidance, from caption embeddings to latents."""
    lines = []
    for model in bench.some(MODELS):
        for way in ("eager", "fused kernels", "diffusers"):
            for size in SIZES:
                for batch_size in bench.some((1, 16)):
                    shape = Shape(model=model, size=size, batch_size=batch_size, training=False)
                    two_runs = 2 * 2 * NUM_STEPS * shape.flops(PRESETS[model], batch_size) / PLANNED_RATE
                    lines.append(
                        Line(
                            section=f"Sampling, {NUM_STEPS} steps",
                            name=f"{shape.name}, {way}",
                            weight=bench.plan(gpu_s=2 + two_runs, cpu_s=10),
                            run=partial(_measure_sampling, bench, shape, way),
                            only_gpu=way in ONLY_GPU,
                            needs=NEEDS.get(way, ""),
                        )
                    )
    return lines


def _measure_sampling(bench: Bench, shape: Shape, way: str) -> Figures:
    kernels, left_out = passed_kernels() if way == "fused kernels" else ([], "")
    whole, forwards = PRESETS[shape.model], 2 * NUM_STEPS
    flops = forwards * shape.flops(whole, shape.batch_size)
    depth, count, remark = bench.fit(whole.depth, shape.batch_size, flops, shape.rough_bytes(whole))
    config, peer = replace(whole, depth=depth), way == "diffusers"
    model = bench.keep((peer, config), lambda: make_model(bench, config, peer=peer))
    model.zero_grad(set_to_none=True)
    bench.forget_peak()
    with fused_kernels(kernels):
        make_sampling(bench, model, replace(shape, batch_size=count), 2, peer=peer)()  # warms up
        seconds = bench.measure(make_sampling(bench, model, replace(shape, batch_size=count), NUM_STEPS, peer=peer), warm=False)
    return Figures(values=bench.compute(seconds, forwards * shape.flops(config, count), count), remark=remark or left_out)


def make_sampling(bench: Bench, model: Any, shape: Shape, num_steps: int, *, peer: bool) -> Run:
    """Draw latents from noise with guidance, by our solver or by diffusers' pipeline."""
    size, count = shape.size // 32, shape.batch_size
    latents = torch.randn(count, 32, size, size, device=bench.device, dtype=bench.dtype)
    captions = make_captions(count, bench.device, bench.dtype)
    null = make_captions(count, bench.device, bench.dtype, real=1)
    if peer:
        from jobs.benchmark.model import make_peer_sampling

        return make_peer_sampling(model, latents, captions, null, num_steps)

    def run() -> Tensor:
        with torch.inference_mode():
            velocity = guided_velocity(model, captions, (null[0][:1], null[1][:1]), guidance_scale=GUIDANCE_SCALE)
            return flow_dpm_solver(velocity, latents, sampling_sigmas(num_steps, FLOW_SHIFT))

    return run
