"""Every part of the model on the device, in three dtypes, against the CPU's float32: the same weights and inputs, by seed.

Each part has its published width (on a CPU, an eighth) and few layers. An error is the norm of the difference over the norm of
the CPU's result.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.benchmark.gpu.bench import DTYPES, Bench, Figures, Line, judge, relative_error
from jobs.benchmark.gpu.kernels import kernel_result
from jobs.benchmark.inputs import FLOW_SHIFT, GUIDANCE_SCALE, SPRINT_FIELDS, make_text_encoder
from sana_model.guidance import guided_velocity
from sana_model.kernels.fused import KERNELS
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AUTOENCODER_PRESETS, PRESETS
from sana_model.nn.controlnet import Control, SanaControlNet
from sana_model.nn.finite import name_dtype
from sana_model.nn.transformer import SanaTransformer
from sana_model.solver import flow_dpm_solver, sampling_sigmas

SECTION = "Correctness: relative error against the CPU's float32"
ENCODERS = ("dc-ae-f32c32-sana-1.1", "dc-ae-f32c32-in-1.0")
DECODERS = (*ENCODERS, "dc-ae-lite-f32c32-sana-1.1")
Run = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """make: the module, in float32 on the CPU. run: its result, from inputs drawn by seed and moved to its device and dtype."""

    name: str
    make: Callable[[], nn.Module]
    run: Run


def correctness_lines(bench: Bench) -> list[Line]:
    lines = []
    for part in make_parts(width=1 if bench.on_gpu else 8):
        weight, run = bench.plan(gpu_s=15, cpu_s=3), partial(check_part, bench, part)
        lines.append(Line(section=SECTION, name=part.name, weight=weight, run=run))
    for name in KERNELS:
        told = f"fused kernel {name}, gradients too"
        run = partial(kernel_result, name)
        lines.append(Line(section=SECTION, name=told, weight=60, run=run, only_gpu=True, needs="triton"))
    return lines


def check_part(bench: Bench, part: Part) -> Figures:
    """Compare one part; with cuDNN's and cuBLAS' TF32 off, or float32 would not be what it says."""
    torch.manual_seed(0)
    module = part.make().eval()
    exact = part.run(module)
    errors = bench.so_far  # dtypes that are done stay if the time ends
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for dtype in DTYPES:
            if not bench.on_gpu and dtype == torch.float16:
                continue  # CPUs' float16 is nobody's way to run it
            moved = deepcopy(module).to(bench.device, dtype)
            errors[name_dtype(dtype)] = relative_error(part.run(moved), exact)
    return judge(errors)


def draw(module: nn.Module, *sizes: Sequence[int]) -> list[Tensor]:
    """Normal values by seed, on the module's device and in its dtype."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator).to(weight.device, weight.dtype) for size in sizes]


def transformer_inputs(model: SanaTransformer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents, embeds = draw(model, (2, 32, 6, 10), (2, 20, model.config.caption_dim))
    mask = torch.arange(20, device=latents.device) < torch.tensor([[20], [7]], device=latents.device)
    return latents, torch.tensor([900.0, 250.0], device=latents.device), embeds, mask


@torch.no_grad()
def run_transformer(model: SanaTransformer) -> Tensor:
    guidance = torch.tensor([4.5, 4.5], device=model.head.weight.device) if model.config.guidance_embeds else None
    return model(*transformer_inputs(model), guidance_scale=guidance)


def run_gradients(model: SanaTransformer) -> Tensor:
    """The gradients of all weights, as one vector."""
    model.requires_grad_(True).zero_grad(set_to_none=True)
    model(*transformer_inputs(model)).float().square().mean().backward()
    return torch.cat([weight.grad.float().flatten().cpu() for weight in model.parameters() if weight.grad is not None])


@torch.no_grad()
def run_sampling(model: SanaTransformer, control: Control | None = None) -> Tensor:
    """Four guided steps, on captions that are encoded once."""
    latents, _, embeds, mask = transformer_inputs(model)
    null = embeds[:1, :1], mask[:1, :1]
    velocity = guided_velocity(model, (embeds, mask), null, guidance_scale=GUIDANCE_SCALE, control=control)
    return flow_dpm_solver(velocity, latents, sampling_sigmas(4, FLOW_SHIFT))


class Steered(nn.Module):
    """A transformer and its ControlNet, whose projections are not zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transformer = make_transformer(width)
        self.controlnet = SanaControlNet.from_transformer(self.transformer, depth=1)
        for projection in (self.controlnet.control_proj, *self.controlnet.outputs):
            nn.init.normal_(projection.weight, std=0.02)


def run_steered(models: Steered) -> Tensor:
    (control,) = draw(models, (2, 32, 6, 10))
    return run_sampling(models.transformer, Control(models.controlnet, control))


def make_transformer(width: int, preset: str = "sana-0.6b", **fields: Any) -> SanaTransformer:
    """Two blocks of a published transformer, `width` times narrower, with heads of the same width."""
    config = PRESETS[preset]
    if width > 1:
        dim = config.dim // width // 32 * 32
        fields |= {"dim": dim, "ffn_dim": dim * 5 // 2, "num_cross_heads": dim // 32, "caption_dim": 64}
    return SanaTransformer(replace(config, depth=2, **fields))


def make_autoencoder(width: int, preset: str) -> DCAutoencoder:
    """At most one block a stage, of the published widths or narrower ones."""
    config = AUTOENCODER_PRESETS[preset]
    encoder, decoder = (tuple(min(depth, 1) for depth in depths) for depths in (config.encoder_depths, config.decoder_depths))
    widths = tuple(max(channels // width, 32) for channels in config.widths)
    return DCAutoencoder(replace(config, encoder_depths=encoder, decoder_depths=decoder, widths=widths))


@torch.no_grad()
def run_encode(model: DCAutoencoder) -> Tensor:
    side = 2 * model.config.compression
    return model.encode(draw(model, (1, 3, side, side))[0].clamp(-1, 1))


@torch.no_grad()
def run_decode(model: DCAutoencoder) -> Tensor:
    return model.decode(draw(model, (1, model.config.latent_channels, 2, 3))[0])


def make_text() -> nn.Module:
    return make_text_encoder(torch.device("cpu"), torch.float32, 1, 1)[0]


def run_text(encoder: Any) -> Tensor:
    """Captions of two lengths behind the kept instruction."""
    return encoder.encode(["w1 w2 w3", " ".join(f"w{index}" for index in range(40))])[0]


def make_parts(width: int) -> list[Part]:
    """All parts, `width` times narrower than published."""
    plain = partial(make_transformer, width)
    large, sprint = partial(plain, "sana-1.6b"), partial(plain, **SPRINT_FIELDS)
    return [
        Part(name="transformer, forward", make=plain, run=run_transformer),
        Part(name="transformer, gradients of all weights", make=plain, run=run_gradients),
        Part(name="transformer 1.6B, forward", make=large, run=run_transformer),
        Part(name="transformer of Sana-Sprint, forward", make=sprint, run=run_transformer),
        Part(name="four guided steps, captions encoded once", make=plain, run=run_sampling),
        Part(name="four guided steps with a ControlNet", make=partial(Steered, width), run=run_steered),
        *(Part(name=f"encode, {name}", make=partial(make_autoencoder, width, name), run=run_encode) for name in ENCODERS),
        *(Part(name=f"decode, {name}", make=partial(make_autoencoder, width, name), run=run_decode) for name in DECODERS),
        Part(name="text encoder, kept prefix", make=make_text, run=run_text),
    ]
