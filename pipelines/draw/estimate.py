"""What drawing pictures will take, memory by part and time, from the shapes of the models alone: no weights are fetched.

Activations are counted on tensors without values, as for trainings (`pipelines/train/preflight`). The time is that of the
operations at the rate of this machine's own matrix products, and of starting each operation.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from pipelines.draw.config import SampleConfig
from pipelines.draw.prompts import read_prompt_set
from pipelines.draw.sampler import steps_of_batch
from pipelines.draw.start import read_start
from pipelines.train.preflight.memory import LiveBytes, count_decoding
from pipelines.train.preflight.models import count_companions, find_autoencoder, find_text_encoder
from pipelines.workers.models import pick_device
from sana_model.arguments import check_size, nearest_multiple
from sana_model.files.pipeline import find_companions
from sana_model.files.places import published_address, resolve
from sana_model.kernels.quantized import check_fp8
from sana_model.memory import Precision, count_moments, plan_memory
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.captions import CaptionState
from sana_model.nn.config import AutoencoderConfig, SanaConfig
from sana_model.nn.finite import name_dtype
from sana_model.nn.quantized import precision_of, quantize_blocks, quantize_layers, stored_bytes
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import CaptionTokens, SanaBlock
from sana_model.pictures import DECODE_TILE, MAX_DECODE_PIXELS
from sana_model.zoo.published import find_published

CAPTION_TOKENS = 100
"""Tokens of a caption that are assumed: a prompt of a few sentences."""
MOMENTS = {"text encoder": "reading the prompts", "transformer": "in a step", "autoencoder": "decoding"}
START_SECONDS = 1e-5
"""To start one operation."""


@dataclass(frozen=True, kw_only=True)
class DrawEstimate:
    """The needs of a drawing.

    parts: name of the part -> bytes of its weights. precisions: of these parts. moments: what works -> bytes of all that is in
    memory then. seconds: part -> seconds. device: what draws. problems: sentences for a person, on what could not be known.
    """

    parts: Mapping[str, int]
    precisions: Mapping[str, str]
    moments: Mapping[str, int]
    seconds: Mapping[str, float]
    device: str
    problems: list[str]

    def describe(self) -> str:
        """The estimate as a text for people."""
        most = max(self.moments, key=lambda moment: self.moments[moment])
        unit, name = (2**30, "GiB") if self.moments[most] >= 2**30 else (2**20, "MiB")
        sizes = [(f"{part}, {self.precisions[part]}", size) for part, size in self.parts.items()]
        sizes += [(f"at once, {moment}", size) for moment, size in self.moments.items()]
        sizes.append((f"at most, {most}", self.moments[most]))
        lines = [f"  {part:<46} {size / unit:8.2f} {name}" for part, size in sizes]
        seconds = [*self.seconds.items(), ("in all, once the model is loaded, about", sum(self.seconds.values()))]
        times = [f"  {part:<46} {value:8.1f} s" for part, value in seconds]
        return "\n".join(["MEMORY", *lines, "", f"TIME, {self.device}", *times, *(f"note: {text}" for text in self.problems)])


def estimate_drawing(config: SampleConfig) -> DrawEstimate:
    """Estimate what drawing takes in this process.

    `config`: its pipeline is on this machine, or a published one by its short name or hf:// address.

    Raises FileNotFoundError or ValueError if the transformer is not there, or as `read_prompt_set`, `read_start` and
    `check_size`.
    """
    problems: list[str] = []
    num_pictures = len(read_prompt_set(config.prompts).prompts) * config.images_per_prompt
    folder, transformer, dtype, saved = _find_transformer(config.pipeline)
    config = replace(config, draw=config.draw.for_model(config.pipeline, is_sprint=transformer.guidance_embeds))
    num_steps = steps_of_batch(config)
    dtype = getattr(torch, config.draw.dtype) if config.draw.dtype else dtype
    companions = find_companions(folder)
    autoencoder = find_autoencoder(companions.autoencoder, problems)
    text_encoder, _ = find_text_encoder(companions, problems)
    if autoencoder is None:
        raise ValueError(f"{problems[0]}; without it nothing can be estimated")
    height, width = _find_size(config, transformer, autoencoder)
    batch, device = min(config.draw.batch_size, num_pictures), pick_device(config.draw.device)
    plan = plan_memory(config.draw.memory, config.draw.precision, device.type)
    if plan.transformer == "fp8":
        check_fp8(device)
    if saved != "full":
        plan = replace(plan, transformer=saved)
    if text_encoder is not None:
        plan = replace(plan, text_encoder=getattr(text_encoder, "precision", plan.text_encoder))
    batches, rate = -(-num_pictures // batch), _measure_rate(device, dtype)
    passes = 1 if config.draw.guidance_scale == 1 or transformer.guidance_embeds else 2
    shape = (batch * passes, height // autoencoder.compression, width // autoencoder.compression)
    step, decoding = _count_step(transformer, dtype, shape, "full"), _count_decoding(autoencoder, dtype, (height, width))
    text_size, autoencoder_size = count_companions(text_encoder, autoencoder)
    quantized = step if plan.transformer == "full" else _count_step(transformer, dtype, shape, plan.transformer)
    weights = {
        "text encoder": _text_bytes(text_encoder, dtype, plan.text_encoder),
        "transformer": quantized.weights,
        "autoencoder": autoencoder_size * dtype.itemsize,
    }
    tile, most = (plan.tile or DECODE_TILE), (plan.tile**2 if plan.tile else MAX_DECODE_PIXELS)
    at_once = (tile, tile) if height * width > most else (height, width)
    decoded = count_decoding(autoencoder, 1 if plan.tile else batch, at_once, dtype)
    moments = count_moments(plan, weights, {"text encoder": 0, "transformer": quantized.peak, "autoencoder": decoded})
    return DrawEstimate(
        parts=weights,
        precisions={"text encoder": plan.text_encoder, "transformer": plan.transformer, "autoencoder": "full"},
        moments={MOMENTS[part]: size for part, size in moments.items()},
        seconds={
            "reading the prompts": num_pictures * 2.0 * text_size * CAPTION_TOKENS / rate,
            f"{num_steps} steps, pictures at once: {batch}, times: {batches}": batches * num_steps * step.seconds(rate),
            "decoding": num_pictures * decoding.seconds(rate),
        },
        device=f"{device.type}, {width}x{height} px, {name_dtype(dtype)}, {rate / 1e12:.2f} TFLOP/s (measured now)",
        problems=[text for text in problems if "tokenizer" not in text]
        + (["what a ControlNet takes is not counted"] if config.control is not None else []),
    )


def _text_bytes(text_encoder: Any, dtype: torch.dtype, precision: Precision) -> int:
    """Bytes of a text encoder's weights, from transformers' configuration of it; 0 of None."""
    if text_encoder is None:
        return 0
    with torch.device("meta"):
        model = AutoModel.from_config(text_encoder, trust_remote_code=False).to(dtype)
        quantize_layers(model, precision)
    return stored_bytes(model)


def _find_transformer(pipeline: str) -> tuple[Path | None, SanaConfig, torch.dtype, Precision]:
    """The pipeline's place (None: a published one, of which nothing is fetched); its transformer's shape, dtype, precision."""
    address = published_address(pipeline) or pipeline
    known = find_published(address) if address.startswith("hf://") else None
    if known is not None and known.config is not None:
        return None, known.config, getattr(torch, known.dtype), "full"
    folder = resolve(pipeline)
    transformer = SanaTransformer.from_pretrained(folder)
    return folder, transformer.config, transformer.head.weight.dtype, precision_of(transformer)


def _find_size(config: SampleConfig, transformer: SanaConfig, autoencoder: AutoencoderConfig) -> tuple[int, int]:
    """(height, width) in pixels, as `TextToImage.image_size` finds them. Raises as `read_start` and `check_size`."""
    unit = autoencoder.compression * transformer.patch_size
    width = height = transformer.base_size * unit
    if config.start is not None:
        num_pictures = 1 if isinstance(config.start.image, str) else len(config.start.image)
        start = read_start(config.start, num_pictures, has_size=config.draw.height is not None)
        width, height = (nearest_multiple(side, unit) for side in start.images[0].size)
    return check_size(config.draw.height or height, config.draw.width or width, unit)


@dataclass(frozen=True)
class _Counted:
    """What a computation takes: floating-point operations, calls, the most bytes alive besides the weights, and theirs."""

    flops: int
    calls: int
    peak: int
    weights: int

    @classmethod
    def of(cls, model: nn.Module, run: Callable[[], object]) -> "_Counted":
        counter = _LiveCalls()
        counter.leave_out(dict(model.named_parameters()) | dict(model.named_buffers()))
        with FlopCounterMode(display=False) as flops, counter:
            run()
        return cls(flops.get_total_flops(), counter.calls, counter.peak, stored_bytes(model))

    def seconds(self, rate: float) -> float:
        return self.flops / rate + START_SECONDS * self.calls


class _LiveCalls(LiveBytes):
    """Counts calls of operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return super().__torch_dispatch__(operation, types, args, kwargs)


def _count_step(config: SanaConfig, dtype: torch.dtype, shape: tuple[int, int, int], precision: Precision) -> _Counted:
    """One forward of the transformer, its captions encoded before. `shape`: (B, h, w) of the latents.

    Operations of 8-bit numbers are not counted.
    """
    batch = shape[0]
    with torch.device("meta"), torch.no_grad():
        model = SanaTransformer(config).to(dtype).eval()
        quantize_blocks(model, "w8a8" if precision == "fp8" else precision)  # as many bytes, and counted on any device
        latents = torch.empty(batch, config.in_channels, *shape[1:], dtype=dtype)
        packed = model.caption_proj(torch.empty(batch * CAPTION_TOKENS, config.caption_dim, dtype=dtype))
        tokens = CaptionTokens(packed, torch.arange(len(packed)), None, batch, CAPTION_TOKENS)
        blocks = cast(Iterable[SanaBlock], model.blocks)
        memories = [block.cross_attention.remember(tokens) for block in blocks]
        state = CaptionState(batch, 0, memories, None)  # `encode_captions` looks at values, which are not there
        guidance = torch.empty(batch) if config.guidance_embeds else None
        return _Counted.of(model, lambda: model(latents, torch.empty(batch), state, guidance_scale=guidance))


def _count_decoding(config: AutoencoderConfig, dtype: torch.dtype, size: tuple[int, int]) -> _Counted:
    """Decoding one picture of (height, width) pixels."""
    with torch.device("meta"), torch.no_grad():
        model = DCAutoencoder(config).to(dtype).eval()
        height, width = (side // config.compression for side in size)
        latents = torch.empty(1, config.latent_channels, height, width, dtype=dtype)
        return _Counted.of(model, lambda: model.decode(latents))


def _measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of two matrices: the best of a few."""
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
