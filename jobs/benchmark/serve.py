"""Pictures a second over HTTP, against the bare loop that draws the same batches with the same model."""

import asyncio
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import torch

from jobs.benchmark.config import ServeBenchmarkConfig
from jobs.benchmark.timing import measure_seconds
from jobs.benchmark.turns import in_turns
from jobs.common.ray import start_ray
from jobs.serve import serving
from pipelines.draw.config import DrawConfig, read_size
from pipelines.serve.batches import Ticket
from pipelines.serve.drawing import BatchDrawer
from pipelines.serve.metrics import PainterMetrics
from pipelines.serve.orders import Order, Settings

PROMPT = "a large red circle on a white background"


def benchmark_serve(config: ServeBenchmarkConfig) -> None:
    """Draw in turns here and over HTTP, and print the rates and their ratio.

    The loop has the threads that a replica has (`resources.num_cpus`); clients, front and proxy need a core besides them.
    """
    torch.set_num_threads(max(1, round(config.resources.num_cpus)))
    count = config.num_batches * config.batch_size
    with start_ray(config.ray), serving(config, False) as address:
        drawer = BatchDrawer(config.to_serve(), PainterMetrics("loop"))
        draw_bare(drawer, config, 1)
        ask_all(address, config, config.batch_size)
        ways = {
            "bare": partial(draw_bare, drawer, config, config.num_batches),
            "served": partial(ask_all, address, config, count),
        }
        measures = {name: partial(measure_seconds, way, torch.device("cpu")) for name, way in ways.items()}
        seconds = in_turns(measures, config.repeats, label="turns")
    bare, served = (count / statistics.median(taken) for taken in seconds.values())
    ratios = [bare_s / served_s for bare_s, served_s in zip(*seconds.values(), strict=True)]
    print(f"bare loop  {bare:8.2f} pictures/s, batches of {config.batch_size}, {config.steps} steps")
    print(f"served     {served:8.2f} pictures/s, {config.clients} clients")
    print(f"ratio      {statistics.median(ratios):8.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def draw_bare(drawer: BatchDrawer, config: ServeBenchmarkConfig, num_batches: int) -> None:
    """Draw batches, one after another."""
    width, height = read_size(config.size)
    settings = Settings(
        height=height, width=width, num_steps=config.steps, guidance_scale=DrawConfig.guidance_scale, negative_prompt=""
    )
    loop = asyncio.new_event_loop()
    for _ in range(num_batches):
        order = Order(prompt=PROMPT, seeds=list(range(config.batch_size)), settings=settings)
        drawer.draw([Ticket(order, index, loop.create_future()) for index in range(config.batch_size)])
    loop.close()


def ask_all(address: str, config: ServeBenchmarkConfig, count: int) -> None:
    """Have clients ask for `count` pictures in all. Raises httpx.HTTPStatusError if one is refused."""
    with httpx.Client(timeout=None) as client, ThreadPoolExecutor(config.clients) as threads:

        def ask(seed: int) -> None:
            body = {"prompt": PROMPT, "seed": seed, "steps": config.steps, "size": config.size or "auto"}
            client.post(f"{address}/v1/images/generations", json=body).raise_for_status()

        list(threads.map(ask, range(count)))
