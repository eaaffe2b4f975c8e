"""Metrics: pictures a second that the evaluate stage's worker judges, against a bare loop over the same model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from jobs.benchmark.config import JudgingConfig
from jobs.benchmark.timing import Clocks, measure_clocks
from jobs.benchmark.turns import in_turns
from jobs.common.text_table import format_table
from pipelines.evaluate.metric import Metric
from pipelines.evaluate.registry import metric_class
from pipelines.evaluate.run import MetricWorker, as_judged
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import full_caption
from pipelines.shapes.scenes import ShapesConfig
from pipelines.tables.schema import Row
from pipelines.workers.images import to_png


def drawn_pictures(count: int, side: int) -> pa.Table:
    """Drawn scenes of one object as PNG files, with prompts that ask for them: the columns of a samples table."""
    drawn = [draw_row(row, ShapesConfig(pair_share=0.0, image_size=side)) for row in range(count)]
    rows = [
        {"id": f"{row:06d}", "prompt": full_caption(scene), "image_bytes": to_png(Image.fromarray(pixels)), "metadata": None}
        for row, (scene, pixels) in enumerate(drawn)
    ]
    return pa.Table.from_pylist(rows)


def bare_loop(metric: Metric[Any], rows: list[Row], batch_size: int) -> None:
    """Prepare and judge one batch after the other: what a script would do."""
    for start in range(0, len(rows), batch_size):
        metric.judge([as_judged(row, metric.prepare(row)) for row in rows[start : start + batch_size]])


def model_alone(metric: Metric[Any], ready: list[Row], batch_size: int) -> None:
    """Judge pictures that are prepared already."""
    for start in range(0, len(ready), batch_size):
        metric.judge(ready[start : start + batch_size])


def time_ways(ways: Sequence[Callable[[], object]], repeats: int, name: str) -> list[Clocks]:
    """The medians of each way's seconds."""
    measures = {number: partial(measure_clocks, way, torch.device("cpu")) for number, way in enumerate(ways)}
    return [Clocks.medians(rounds) for rounds in in_turns(measures, repeats, label=name).values()]


def benchmark_judging(config: JudgingConfig) -> None:
    """Print for each metric the pictures a second of the worker, of the bare loop and of the model alone, in turns; medians.

    The bare loop prepares and judges batch by batch in one thread. Raises as `Metric.find_models`, and ValueError if a metric
    refuses pictures.
    """
    torch.set_num_threads(config.num_threads)
    pictures = drawn_pictures(config.num_pictures, config.side)
    rows = []
    for name in config.metrics:
        settings, _ = metric_class(name).find_models(getattr(config, name))
        worker = MetricWorker(name, settings)
        if refused := worker.process(pictures).rejects:  # warms up too
            raise ValueError(f"{name} refuses {len(refused)} of {pictures.num_rows} pictures: {refused[0]['detail']}")
        ready = [as_judged(row, worker.metric.prepare(row)) for row in pictures.to_pylist()]
        worker_s, loop_s, model_s = time_ways(
            [
                partial(worker.process, pictures),
                partial(bare_loop, worker.metric, pictures.to_pylist(), settings.batch_size),
                partial(model_alone, worker.metric, ready, settings.batch_size),
            ],
            config.repeats,
            name,
        )
        speeds = [config.num_pictures / seconds.wall for seconds in (worker_s, loop_s, model_s)]
        ratios = [loop_s.wall / worker_s.wall, model_s.wall / worker_s.wall, loop_s.cpu / worker_s.cpu]
        rows.append([name, *(f"{speed:.1f}" for speed in speeds), *(f"{ratio:.1%}" for ratio in ratios)])
    columns = ["pictures/s", "the stage's worker", "bare loop", "model alone", "worker/loop", "worker/model", "by CPU seconds"]
    print(format_table(columns, rows))
    print(f"medians of {config.repeats} over {config.num_pictures} pictures of {config.side} px")
    print("by CPU seconds: worker/loop, which other work on the machine changes least")
