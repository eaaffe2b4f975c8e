"""The needs of an autoencoder's training, computed before it starts: weights, memory by part, steps and days, problems.

Forward and backward passes of the real modules run on fake tensors, which have shapes but no values; see
`pipelines/train/preflight/memory.py`.
"""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines.tables.errors import MissingTableError
from pipelines.train.loop.meter import PEAK_FLOPS
from pipelines.train.preflight.memory import (
    CONTEXT_BYTES,
    LiveBytes,
    Memory,
    count_weights,
    forget_gradient,
    gradient_bytes,
    held_always,
    make_fake,
    step_bytes,
)
from pipelines.train.preflight.models import known_autoencoder
from pipelines.train.preflight.run import ASSUMED_MFU, GIB
from pipelines.train_autoencoder.config import PerceptualConfig, TrainAutoencoderConfig
from pipelines.train_autoencoder.parts import TrainableAutoencoder, describe_parts
from pipelines.train_autoencoder.perceptual import load_perceptual
from pipelines.train_autoencoder.run import check_tables
from pipelines.train_autoencoder.stream import COLUMNS, find_sources, shorter_sides
from pipelines.workers.models import is_hub_id, naming
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AUTOENCODER_PRESETS, AutoencoderConfig
from sana_model.nn.discriminator import PatchDiscriminator

ASSUMED_SHAPE = "dc-ae-f32c32-sana-1.1"
"""Preset of an `init` that is not there yet, such as the result of a phase before."""
VGG_16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of VGG-16's convolutions; 0 is a pooling by 2."""


@dataclass
class AutoencoderPreflight:
    """The result of a preflight.

    shape: of the autoencoder. parts: what is trained, in words. memory: of one device. flops: of a step, all workers together.
    dataset: lines about the tables. problems: sentences for a person, a lack of memory first.
    """

    training: TrainAutoencoderConfig
    shape: AutoencoderConfig
    parts: str
    memory: Memory
    flops: float
    dataset: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_preflight(dataset_uri: str, training: TrainAutoencoderConfig, *, device_gib: float) -> AutoencoderPreflight:
    """Estimate what a training will need, from its configuration and its tables. Needs no Ray and no GPU.

    Args:
        dataset_uri: the training's dataset; its tables need not exist yet.
        training: the training.
        device_gib: memory of a GPU, in GiB; more than this is a problem.

    Raises FileNotFoundError or ValueError if the shape of the autoencoder cannot be known, or does not fit the crops.
    """
    problems: list[str] = []
    shape = find_shape(training, problems)
    training.check_shape(shape)
    with torch.device("meta"):
        model = TrainableAutoencoder(DCAutoencoder(shape), training.parts)
    parts = describe_parts(model, training.parts)
    perceptual = _meta_perceptual(training.losses.perceptual, problems)
    memory, flops = _count(training, model, perceptual)
    result = AutoencoderPreflight(training, shape, parts, memory, flops, problems=problems)
    if training.resources.num_gpus > 0 and memory.total > device_gib * GIB:
        problems.insert(
            0,
            f"{memory.total / GIB:.1f} GiB are more than the {device_gib:g} GiB of a GPU: take engine.checkpoint_blocks=1, a "
            "smaller micro_batch_size, smaller data.sizes, or fewer parts",
        )
    _look_at_tables(dataset_uri, result)
    _look_at_settings(result)
    return result


def find_shape(training: TrainAutoencoderConfig, problems: list[str]) -> AutoencoderConfig:
    """The autoencoder's shape, without fetching weights from a hub."""
    if training.init is None:
        return training.new_shape()
    with naming("init"):
        known = known_autoencoder(training.init)
    if known is not None:
        return known
    if "://" in training.init and not training.init.startswith(("zoo://", "file://")):
        raise ValueError(f"init={training.init} is not on this machine, and its name tells no published shape: fetch it first")
    problems.append(f"init={training.init} is not there (yet): its shape is taken from {ASSUMED_SHAPE}")
    return AUTOENCODER_PRESETS[ASSUMED_SHAPE]


def _meta_perceptual(config: PerceptualConfig | None, problems: list[str]) -> nn.Module | None:
    """The perceptual loss's network without values, as far as it is known."""
    if config is None:
        return None
    if config.kind == "lpips":
        if find_spec("lpips") is None:
            problems.append('losses.perceptual.kind=lpips needs its package on each worker: pip install "sana-on-ray[lpips]"')
        if "://" not in config.model and not Path(config.model).exists():
            problems.append(f"losses.perceptual.model={config.model} is not there (yet)")
        layers: list[nn.Module] = []
        before = 3
        for channels in VGG_16:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()] if channels else [nn.MaxPool2d(2)]
            before = channels or before
        return nn.Sequential(*layers).requires_grad_(False).to("meta")
    try:
        return load_perceptual(_on_this_machine(config)).to("meta")
    except (OSError, ValueError) as error:
        problems.append(f"the memory of the perceptual loss is not counted: {error}")
        return None


def _on_this_machine(config: PerceptualConfig) -> PerceptualConfig:
    """The same with the local folder of its model; raises FileNotFoundError if the model would have to be fetched."""
    path = config.model
    with naming("losses.perceptual.model"):
        if is_hub_id(path):
            try:
                path = snapshot_download(path, revision=config.revision, local_files_only=True)
            except LocalEntryNotFoundError as error:
                raise FileNotFoundError(f"{path} is not on this machine (yet)") from error
        elif "://" in path and not path.startswith(("zoo://", "file://")):
            raise FileNotFoundError(f"{path} is not on this machine")
    return replace(config, model=path, revision=None)


def _count(training: TrainAutoencoderConfig, model: TrainableAutoencoder, perceptual: nn.Module | None) -> tuple[Memory, float]:
    """Memory of one device, and the FLOPs of a step of all workers."""
    engine, adversarial = training.engine, training.losses.adversarial
    total, trained = count_weights(model)
    fixed = {
        **held_always(training, total, trained),
        "perceptual loss": 0 if perceptual is None else engine.torch_dtype.itemsize * count_weights(perceptual)[0],
        "CUDA context and libraries": CONTEXT_BYTES if training.resources.num_gpus > 0 else 0,
    }
    discriminator = None
    if adversarial is not None:
        with torch.device("meta"):
            discriminator = PatchDiscriminator(layers=adversarial.layers, width=adversarial.width)
        size = count_weights(discriminator)[0]
        fixed["discriminator, its optimizer and gradients"] = (engine.torch_dtype.itemsize * 2 + 12) * size
    if engine.checkpoint_blocks:
        model.enable_gradient_checkpointing(engine.checkpoint_blocks)
    activations, flops = _count_passes(training, model, perceptual, discriminator)
    gradients, bucket = gradient_bytes(training, trained)
    moments = {
        "forward and backward": {"gradients": gradients, "buckets of gradients": bucket, "activations": activations},
        "the optimizer's step": {"gradients": gradients, "step": step_bytes(engine, trained)},
    }
    micro_batches = training.num_workers * training.grad_accum_steps
    return Memory.largest(fixed, moments), flops * micro_batches


def _count_passes(
    training: TrainAutoencoderConfig,
    model: TrainableAutoencoder,
    perceptual: nn.Module | None,
    discriminator: nn.Module | None,
) -> tuple[int, float]:
    """Bytes at the peak of the passes over a micro-batch of the largest crops, and their FLOPs."""
    dtype, size = training.engine.torch_dtype, max(training.data.sizes)
    with FakeTensorMode(), FlopCounterMode(display=False) as counted:
        networks = [network for network in (model, perceptual, discriminator) if network is not None]
        for network in networks:
            make_fake(network, dtype)
        model.train()
        counter = LiveBytes()
        for network in networks:
            counter.leave_out({name: one for name, one in [*network.named_parameters(), *network.named_buffers()]})
            for weight in network.parameters():
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(forget_gradient)
        with counter:
            image, nothing = torch.empty(training.micro_batch_size, 3, size, size), torch.empty(1, 1, 1, 1, dtype=dtype)
            decoded, _ = model(image.to(dtype), nothing, nothing)
            loss = (decoded.float() - image).abs().mean()
            if perceptual is not None:
                loss = loss + _perceive(perceptual, decoded, image.to(dtype))
            if discriminator is not None:
                loss = loss - discriminator(decoded).mean()
                discriminator(torch.cat([image.to(dtype), decoded.detach()])).mean().backward()
            loss.backward()
    return counter.peak, float(counted.get_total_flops())


def _perceive(perceptual: Any, decoded: Tensor, image: Tensor) -> Tensor:
    if isinstance(perceptual, nn.Sequential):
        return perceptual(torch.cat([decoded, image])).mean()
    return perceptual(decoded, image).mean()


def _look_at_tables(dataset_uri: str, result: AutoencoderPreflight) -> None:
    """Add lines about the images tables, how many images are too small, and what the training will refuse."""
    training = result.training
    largest = max(training.data.sizes)
    needed = largest / (training.data.scale[1] * training.data.max_upscale)
    num_images = 0
    all_there = True
    sources = find_sources(dataset_uri, training.data)
    for source in sources:
        try:
            manifest = source.manifest
        except MissingTableError:
            result.dataset.append(f"{source.table.uri} does not exist yet")
            all_there = False
            continue
        try:
            source.check_complete()
        except (MissingTableError, ValueError) as error:
            result.problems.append(f"the training will refuse {source.table.uri} until this is mended: {error}")
            all_there = False
        shards = source.table.list_shards()
        num_images += manifest.num_rows * source.times
        line = f"{source.table.uri}: {manifest.num_rows:,} images in {len(shards)} shards, {source.times} times an epoch"
        if shards:
            rows = source.table.read_shard(shards[0], COLUMNS[1:3])
            sides = shorter_sides(rows)
            small = sum(side < needed for side in sides) / max(len(sides), 1)
            line += f"; in the first of them {small:.1%} are too small for crops of {largest} pixels"
            if small > 0.5:
                result.problems.append(
                    f"{source.table.uri}: {small:.0%} of the images looked at are too small for crops of {largest} pixels, and "
                    "are passed over: take smaller data.sizes or a larger data.max_upscale"
                )
        result.dataset.append(line)
    if all_there:
        try:
            check_tables(dataset_uri, training)
        except (MissingTableError, ValueError) as error:
            result.problems.append(f"the training will refuse this: {error}")
    if num_images:
        epochs = training.num_steps * training.global_batch_size / num_images
        result.dataset.append(f"the training draws each image about {epochs:,.1f} times")


def _look_at_settings(result: AutoencoderPreflight) -> None:
    training, shape = result.training, result.shape
    optim = training.optim
    if optim.warmup_steps + optim.decay_steps > training.num_steps:
        result.problems.append(
            f"warmup_steps={optim.warmup_steps} and decay_steps={optim.decay_steps} are more than num_steps="
            f"{training.num_steps}: the learning rate never reaches {optim.lr:g}"
        )
    if shape.decoder == "in" and training.engine.dtype != "fp32" and training.trains("decoder"):
        result.problems.append(
            f"the decoder has batch norms, with statistics in {training.engine.dtype}: engine.dtype=fp32 keeps them exact"
        )
    adversarial = training.losses.adversarial
    if adversarial is not None and adversarial.start_step >= training.num_steps:
        result.problems.append(
            f"losses.adversarial.start_step={adversarial.start_step} is not below num_steps={training.num_steps}: the "
            "autoencoder never gets this loss"
        )
    if not training.holds_out:
        result.problems.append("no images are held out, so PSNR is not measured: set data.held_out_share")


def format_preflight(result: AutoencoderPreflight) -> str:
    """Return the result as a text for people."""
    training, shape, memory = result.training, result.shape, result.memory
    engine = training.engine
    lines = [
        "MODEL",
        f"  {shape.compression} pixels to a latent of {shape.latent_channels} channels; widths {list(shape.widths)}",
        f"  {result.parts}",
        "",
        "MEMORY OF ONE DEVICE",
        f"  ZeRO {engine.zero_stage}, {engine.dtype}, {training.optim.optimizer}, {training.num_workers} workers, "
        f"{training.micro_batch_size} crops of {max(training.data.sizes)} pixels",
        *(f"  {name:<44} {size / GIB:8.2f} GiB" for name, size in memory.parts.items()),
        f"  {'total, ' + memory.moment:<44} {memory.total / GIB:8.2f} GiB",
        "",
        "STEPS",
        f"  one step is {training.global_batch_size:,} crops = {training.micro_batch_size} in a micro-batch x "
        f"{training.num_workers} workers x {training.grad_accum_steps} accumulated, {result.flops / 1e15:,.3f} PFLOP",
        f"  {training.num_steps:,} steps, {training.num_steps * training.global_batch_size:,} crops",
    ]
    if training.resources.num_gpus > 0:
        days = {
            name: training.num_steps * result.flops / (PEAK_FLOPS[name] * ASSUMED_MFU * training.num_workers) / 86400
            for name in ("A100", "H100")
        }
        shown = ", ".join(f"{value:.2f} days on {training.num_workers} {name}" for name, value in days.items())
        lines.append(f"  {shown}, if they reach {ASSUMED_MFU:.0%} of their peak")
    lines += ["", "DATASET", *(f"  {line}" for line in result.dataset), "", "PROBLEMS"]
    lines += [f"  - {problem}" for problem in result.problems] or ["  none found"]
    return "\n".join(lines)
