"""A training step of DC-AE compared with the same step of diffusers' `AutoencoderDC`: images per second, on random weights."""

import gc
import platform
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.benchmark.config import AutoencoderStepConfig
from jobs.benchmark.model import make_peer_autoencoder
from jobs.benchmark.timing import Clocks, measure_clocks, readable
from jobs.benchmark.turns import in_turns
from jobs.common.text_table import format_table
from pipelines.train.engine.config import OptimConfig
from pipelines.train.engine.optim import make_optimizer
from pipelines.train_autoencoder.parts import TrainableAutoencoder, keep_first
from sana_model.nn.autoencoder import DCAutoencoder

Decode = Callable[[Tensor], Tensor]
Passes = Callable[[Tensor], None]


def benchmark_autoencoder(config: AutoencoderStepConfig) -> None:
    """Print, for each size, the images per second of a step of all weights: forward pass, L1, backward pass and AdamW.

    The passes of both are timed in turns. AdamW, which does the same for both, is timed once, so that one model's states are
    held and not two.
    """
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"f32c32-sana-1.1, {config.dtype}, {place}, {torch.get_num_threads()} CPU threads")
    models = make_models(device, dtype)
    passes = {way: make_passes(*model) for way, model in models.items()}
    medians = {
        (size, count): _time_passes(passes, (size, count), config.repeats, device, dtype)
        for size, count in zip(config.sizes, config.batch_sizes, strict=True)
    }
    ours = models["ours"][0]
    del models, passes
    gc.collect()
    update_s = time_update(ours, config.repeats, device)
    rows = [_format_row(*shape, both["ours"], both["diffusers"], update_s) for shape, both in medians.items()]
    print(f"AdamW takes {readable(update_s.wall)}, whatever the images; a step is the passes and AdamW.")
    columns = ["", "passes: ours", "diffusers", "step: ours, images/s", "diffusers", "ratio", "by CPU seconds"]
    print(format_table(columns, rows))
    print("by CPU seconds: the same ratio, which other work on the machine changes least; without meaning on a GPU")


def make_models(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Decode]]:
    """Both models, each with the function that encodes and decodes an image."""
    ours = TrainableAutoencoder(DCAutoencoder.from_preset("dc-ae-f32c32-sana-1.1"), ("all",)).to(device, dtype).train()
    peer = make_peer_autoencoder(ours.config.scaling_factor).to(device, dtype).train()
    channels = ours.config.latent_channels
    keep, noise = keep_first(channels, channels, device).to(dtype), torch.zeros(1, 1, 1, 1, device=device, dtype=dtype)
    return {"ours": (ours, lambda image: ours(image, keep, noise)[0]), "diffusers": (peer, lambda image: peer(image).sample)}


def make_passes(model: nn.Module, decode_again: Decode) -> Passes:
    """Forward pass, L1 and backward pass; the gradients are dropped."""

    def run(image: Tensor) -> None:
        F.l1_loss(decode_again(image), image).backward()
        model.zero_grad()

    return run


def _time_passes(
    passes: dict[str, Passes], shape: tuple[int, int], repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Clocks]:
    """Median seconds of each model's passes over a batch. `shape`: side of the images in pixels, and their number."""
    size, count = shape
    image = torch.rand(count, 3, size, size, device=device, dtype=dtype) * 2 - 1
    ways = {way: partial(measure_clocks, partial(run, image), device) for way, run in passes.items()}
    measured = in_turns(ways, repeats, label=f"{size} px", warm_up=True)
    return {way: Clocks.medians(seconds) for way, seconds in measured.items()}


def time_update(model: nn.Module, repeats: int, device: torch.device) -> Clocks:
    """Median seconds of AdamW over all weights."""
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()  # makes its states
    return Clocks.medians(measure_clocks(optimizer.step, device) for _ in range(repeats))


def _format_row(size: int, count: int, ours: Clocks, peer: Clocks, update: Clocks) -> list[str]:
    steps = [passes.wall + update.wall for passes in (ours, peer)]
    return [
        f"{size} px, {count} images",
        *(readable(passes.wall) for passes in (ours, peer)),
        *(f"{count / seconds:.3g}" for seconds in steps),
        f"{steps[1] / steps[0]:.2f}x",
        f"{(peer.cpu + update.cpu) / (ours.cpu + update.cpu):.2f}x",
    ]
