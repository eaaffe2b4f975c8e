"""A training step of this system compared with the published recipe's: images per second.

Ours: latents are extracted in advance, the instruction's keys and values are cached, captions are not padded. The
recipe's: each step encodes its images with DC-AE and its captions over 540 padded tokens, by diffusers' modules. Both train a
transformer of Sana-0.6B's width with the same optimizer, on the same batch.
"""

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import diffusers
import torch

from jobs.benchmark.config import TrainStepConfig
from jobs.benchmark.model import make_peer_autoencoder, make_text, make_transformers, training_forwards
from jobs.benchmark.timing import measure_seconds, readable
from jobs.benchmark.turns import in_turns
from pipelines.train.engine.config import OptimConfig
from pipelines.train.engine.optim import make_optimizer
from sana_model.nn.config import AUTOENCODER_PRESETS, PRESETS

TEXT_DEPTH = 26  # of gemma-2-2b
SCALING_FACTOR = AUTOENCODER_PRESETS["dc-ae-f32c32-sana-1.1"].scaling_factor
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step: ours (None: not needed), the recipe's, and the factor by which the depth of both is cut."""

    name: str
    ours: Run | None
    recipe: Run
    cut: float


def benchmark_train(config: TrainStepConfig) -> None:
    """Print what each part of a step takes, both ways in turns, and images per second: as measured, and at full depth.

    DC-AE is whole; transformer and text encoder have their true width, and a depth that this machine can bear. At full depth,
    the parts' times count as many times as they have been cut: the layers of each are alike. (What does not grow with depth,
    embeddings and heads, so counts too often, in both ways.) With `--depth 28 --text_depth 26` nothing is cut.
    """
    device, dtype, batch_size = torch.device(config.device), config.dtype, config.batch_size
    depth, text_depth = config.depth, config.text_depth
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {name}, {torch.get_num_threads()} CPU threads, {dtype}"
    )
    print(f"depth {depth} of {PRESETS['sana-0.6b'].depth}, text depth {text_depth} of {TEXT_DEPTH}, batch {batch_size}")
    for size in config.sizes:
        parts = make_parts(device, getattr(torch, dtype), size, depth=depth, text_depth=text_depth, batch_size=batch_size)
        seconds = time_parts(parts, device, config.repeats, label=f"{size} px")
        print(f"\n{size} px\n" + format_parts(parts, seconds, batch_size), flush=True)


def make_parts(
    device: torch.device, dtype: torch.dtype, size: int, *, depth: int, text_depth: int, batch_size: int
) -> list[Part]:
    """DC-AE, text encoder, and the training of the transformer."""
    autoencoder = make_peer_autoencoder(SCALING_FACTOR).encoder.to(device, dtype).eval()
    images = torch.rand(batch_size, 3, size, size, device=device, dtype=dtype) * 2 - 1

    @torch.no_grad()
    def encode() -> object:
        return autoencoder(images)

    text_ours, text_recipe = make_text(device, dtype, text_depth, batch_size)
    train_ours, train_recipe = _trainings(device, dtype, size, depth, batch_size)
    return [
        Part(name="DC-AE encodes images", ours=None, recipe=encode, cut=1.0),
        Part(name="text encoder", ours=text_ours, recipe=text_recipe, cut=TEXT_DEPTH / text_depth),
        Part(name="transformer and optimizer", ours=train_ours, recipe=train_recipe, cut=PRESETS["sana-0.6b"].depth / depth),
    ]


def _trainings(device: torch.device, dtype: torch.dtype, size: int, depth: int, batch_size: int) -> tuple[Run, Run]:
    """Forward, backward and AdamW, ours and the recipe's."""
    models = make_transformers(device, dtype, depth)
    runs: list[Run] = []
    for model, forward in zip(models, training_forwards(*models, size, batch_size), strict=True):
        optimizer = make_optimizer(model.parameters(), OptimConfig())

        def step(forward: Callable[[], torch.Tensor] = forward, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            forward().float().square().mean().backward()
            optimizer.step()

        runs.append(step)
    return runs[0], runs[1]


def time_parts(parts: list[Part], device: torch.device, repeats: int, *, label: str) -> list[tuple[float, float]]:
    """Medians in seconds of each part, (ours, the recipe's), after a warm-up; in turns: what disturbs one disturbs all."""
    runs = {(number, way): run for number, part in enumerate(parts) for way, run in enumerate((part.ours, part.recipe))}
    measures = {place: partial(measure_seconds, run, device) for place, run in runs.items() if run is not None}
    taken = in_turns(measures, repeats, label=label, warm_up=True)
    ours, recipe = ([statistics.median(taken.get((number, way), [0.0])) for number in range(len(parts))] for way in (0, 1))
    return list(zip(ours, recipe, strict=True))


def format_parts(parts: list[Part], seconds: list[tuple[float, float]], batch_size: int) -> str:
    """A line for each part, and for the whole step as measured and at full depth."""
    lines = [f"{'':28} {'ours':>10} {'recipe':>10} {'ratio':>7}"]
    for part, (ours, recipe) in zip(parts, seconds, strict=True):
        ratio = f"{recipe / ours:6.2f}x" if ours else "      -"
        lines.append(f"{part.name:28} {readable(ours):>10} {readable(recipe):>10} {ratio}")
    for name, factors in (("step as measured", [1.0] * len(parts)), ("step at full depth", [part.cut for part in parts])):
        ours, recipe = (sum(factor * pair[way] for factor, pair in zip(factors, seconds, strict=True)) for way in (0, 1))
        rates = f"{batch_size / ours:.3g} against {batch_size / recipe:.3g} images/s"
        lines.append(f"{name:28} {readable(ours):>10} {readable(recipe):>10} {recipe / ours:6.2f}x  {rates}")
        shares = [factor * recipe_s / recipe for factor, (_, recipe_s) in zip(factors, seconds, strict=True)]
        spread = ", ".join(f"{part.name} {share:.0%}" for part, share in zip(parts, shares, strict=True))
        lines.append(f"{'':28} of the recipe's: {spread}")
    return "\n".join(lines)
