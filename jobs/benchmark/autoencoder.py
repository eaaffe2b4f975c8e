"""A training step of DC-AE compared with the same step of diffusers' `AutoencoderDC`: images per second, on random weights."""

import platform
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.benchmark.config import AutoencoderStepConfig
from jobs.benchmark.model import make_peer_autoencoder
from jobs.benchmark.timing import Entry, time_entry
from jobs.common.text_table import format_table
from pipelines.train.engine.config import OptimConfig
from pipelines.train.engine.optim import make_optimizer
from pipelines.train_autoencoder.parts import TrainableAutoencoder, keep_first
from sana_model.nn.autoencoder import DCAutoencoder

Step = Callable[[Tensor], None]


def benchmark_autoencoder(config: AutoencoderStepConfig) -> None:
    """Print, for each size, the images per second of forward pass, L1, backward pass and AdamW, both ways timed in turns."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"f32c32-sana-1.1, {config.dtype}, {place}, {torch.get_num_threads()} CPU threads, batches of {config.batch_size}")
    ours, peer = make_steps(device, dtype)
    rows = []
    for size in config.sizes:
        image = torch.rand(config.batch_size, 3, size, size, device=device, dtype=dtype) * 2 - 1
        runs = partial(ours, image), partial(peer, image)
        entry = Entry(name=f"{size} px", ours=runs[0], peer=runs[1], dtype=dtype, repeats=config.repeats)
        timing = time_entry(entry, device)
        rates = [f"{config.batch_size / seconds:.3g}" for seconds in (timing.ours_s, timing.peer_s)]
        rows.append([timing.name, *rates, f"{timing.ratio:.2f}x"])
    print(format_table(["", "ours, images/s", "diffusers", "ratio"], rows))


def make_steps(device: torch.device, dtype: torch.dtype) -> tuple[Step, Step]:
    """A training step of all weights, ours and diffusers'."""
    model = TrainableAutoencoder(DCAutoencoder.from_preset("dc-ae-f32c32-sana-1.1"), ("all",)).to(device, dtype).train()
    peer = make_peer_autoencoder(model.config.scaling_factor).to(device, dtype).train()
    channels = model.config.latent_channels
    keep, noise = keep_first(channels, channels, device).to(dtype), torch.zeros(1, 1, 1, 1, device=device, dtype=dtype)
    return make_step(model, lambda image: model(image, keep, noise)[0]), make_step(peer, lambda image: peer(image).sample)


def make_step(model: nn.Module, decode_again: Callable[[Tensor], Tensor]) -> Step:
    """A step with L1 and AdamW."""
    optimizer = make_optimizer(model.parameters(), OptimConfig())

    def step(image: Tensor) -> None:
        optimizer.zero_grad()
        F.l1_loss(decode_again(image), image).backward()
        optimizer.step()

    return step
