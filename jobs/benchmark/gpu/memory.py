"""Peak memory of a forward and backward pass against the forecast of `python -m jobs.train --dry_run`."""

from dataclasses import replace
from functools import partial

from jobs.benchmark.gpu.bench import GIB, Bench, Figures, Line
from jobs.benchmark.gpu.transformer import MODELS, SIZES, Shape, make_model, make_run
from jobs.benchmark.inputs import CAPTION_TOKENS
from pipelines.score.config import SelectionConfig
from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import EngineConfig
from pipelines.train.preflight.memory import StepShape, count_activations, count_weights, fake_transformer
from pipelines.train.stream.config import StreamConfig
from sana_model.nn.config import PRESETS, SanaConfig

BATCH = 16
CPU_DEPTH = 2


def memory_lines(bench: Bench) -> list[Line]:
    lines = []
    for model in bench.some(MODELS):
        for checkpoint_blocks in (0, 1):
            for size in SIZES:
                shape = Shape(model=model, size=size, batch_size=BATCH, training=True)
                how = "blocks recomputed" if checkpoint_blocks else "all activations kept"
                lines.append(
                    Line(
                        section="Memory against the forecast",
                        name=f"{shape.name}, {how}",
                        weight=bench.plan(gpu_s=6, cpu_s=5),
                        run=partial(_measure, bench, shape, checkpoint_blocks),
                    )
                )
    return lines


def make_training(checkpoint_blocks: int) -> TrainConfig:
    """A training whose tables and models nobody looks at: only its engine counts."""
    return TrainConfig(
        latents="latents/none",
        init="none",
        num_steps=1,
        micro_batch_size=BATCH,
        global_batch_size=BATCH,
        data=StreamConfig(captioners=("none",), selection=SelectionConfig(policy="random")),
        engine=EngineConfig(checkpoint_blocks=checkpoint_blocks),
    )


def forecast_bytes(config: SanaConfig, shape: Shape, checkpoint_blocks: int) -> int:
    """Weights, their gradients and activations in bfloat16."""
    training, side = make_training(checkpoint_blocks), shape.size // 32
    step = StepShape(samples=shape.batch_size, height=side, width=side, caption_tokens=CAPTION_TOKENS)
    with fake_transformer(config, training) as model:
        weights, _ = count_weights(model)
        return count_activations(model, step, training.engine.torch_dtype) + 2 * 2 * weights


def _measure(bench: Bench, shape: Shape, checkpoint_blocks: int) -> Figures:
    whole = PRESETS[shape.model]
    config = whole if bench.on_gpu else replace(whole, depth=CPU_DEPTH)
    forecast = {"forecast_gib": forecast_bytes(config, shape, checkpoint_blocks) / GIB}
    if not bench.on_gpu:
        return Figures(values=forecast, remark=f"depth {CPU_DEPTH}; a CPU counts no peak to compare it with")
    model = bench.keep((False, config), lambda: make_model(bench, config, peer=False))
    model.enable_gradient_checkpointing(checkpoint_blocks)
    bench.forget_peak()
    try:
        make_run(bench, model, shape, peer=False)()
    finally:
        model.enable_gradient_checkpointing(0)
    peak = bench.peak()
    return Figures(values=forecast | peak, remark=f"forecast / peak {forecast['forecast_gib'] / peak['peak_gib']:.0%}")
