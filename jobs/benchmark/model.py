"""`sana_model` against diffusers 0.42, part by part, with random weights of the published shapes."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import diffusers
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from jobs.benchmark.config import ModelConfig
from jobs.benchmark.inputs import (
    CAPTION_TOKENS,
    FLOW_SHIFT,
    GUIDANCE_SCALE,
    NUM_STEPS,
    SPRINT_FIELDS,
    make_captions,
    make_text_encoder,
    make_transformer_inputs,
)
from jobs.benchmark.timing import Entry, format_timings, time_entry
from jobs.benchmark.variants import Pair, controlnet_sampling, make_controlnets, sprint_sampling
from sana_model.guidance import Caption, guided_velocity
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import PRESETS, SanaConfig
from sana_model.nn.transformer import SanaTransformer
from sana_model.solver import flow_dpm_solver, sampling_sigmas


class MakeEntry(Protocol):
    """Makes one line of the table: (what, its size, ours and the peer's, timings of each)."""

    def __call__(self, what: str, size: int | str, pair: Pair, times: int) -> Entry: ...


def benchmark_model(config: ModelConfig) -> None:
    """Print medians and ratios of our model against diffusers', both in this process and in turns.

    The transformer has the width of Sana-0.6B; captions have 60 real tokens of 300. `ours/mm` is the share of this machine's
    own torch.mm rate that our way reaches on the operations that it does; oneDNN's products can pass 100 %.
    """
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {name}, {torch.get_num_threads()} CPU threads")
    print(f"depth {config.depth}, text depth {config.text_depth}, batch {config.batch_size}")
    timings = []
    for dtype in config.dtypes:
        for entry in _entries(config, device, getattr(torch, dtype)):
            timings.append(time_entry(entry, device))
            print(format_timings(timings[-1:]).splitlines()[-1], flush=True)
    print("\n" + format_timings(timings))


def _entries(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Entry]:
    """The entries of all parts; the models of one part at a time are in memory."""
    label, few = str(dtype).removeprefix("torch."), max(config.repeats // 2, 1)
    batch_size, parts = config.batch_size, config.parts

    def entry(what: str, size: int | str, pair: Pair, times: int, forward: Pair | None = None) -> Entry:
        name = f"{what} {size} {label}"
        return Entry(name=name, ours=pair[0], peer=pair[1], dtype=dtype, repeats=times, forward=forward)

    transformer_parts = {
        "forward": (_forward, config.repeats),
        "training": (_training, config.repeats),
        "sampling": (_sampling, few),
    }
    if transformer_parts.keys() & set(parts):
        ours, peer = make_transformers(device, dtype, config.depth)
        for size in config.sizes:
            for part in [part for part in transformer_parts if part in parts]:
                make, times = transformer_parts[part]
                forward = _forward(ours, peer, size, batch_size) if part == "training" else None
                yield entry(f"transformer {part}", f"{size} px", make(ours, peer, size, batch_size), times, forward)
        del ours, peer
    yield from _variants(config, device, dtype, entry)
    if "autoencoder" in parts:
        for what, pair in _autoencoder(device, dtype, config.autoencoder_size, batch_size).items():
            yield entry(f"DC-AE {what}", f"{config.autoencoder_size} px", pair, few)
    if "text" in parts:
        pair = make_text(device, dtype, config.text_depth, config.captions)
        yield entry("text encoder", f"{config.captions} captions", pair, few)


def _variants(config: ModelConfig, device: torch.device, dtype: torch.dtype, entry: MakeEntry) -> Iterator[Entry]:
    """The entries of Sana-Sprint and of a transformer with its ControlNet."""
    few = max(config.repeats // 2, 1)
    if "sprint" in config.parts:
        sprints = make_transformers(device, dtype, config.depth, **SPRINT_FIELDS)
        for size in config.sizes:
            latents, _, *captions = make_transformer_inputs(sprints[0], size, config.batch_size)
            pair = sprint_sampling(*sprints, latents, (captions[0], captions[1]), GUIDANCE_SCALE)
            yield entry("Sprint 2 steps", f"{size} px", pair, config.repeats)
        del sprints
    if "controlnet" in config.parts:
        steered = make_transformers(device, dtype, max(config.depth, 2))
        controlnets = make_controlnets(*steered)
        for size in config.sizes:
            latents, _, *captions = make_transformer_inputs(steered[0], size, config.batch_size)
            null = make_captions(config.batch_size, device, dtype, real=1)
            settings: dict[str, Any] = {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "flow_shift": FLOW_SHIFT}
            pair = controlnet_sampling(steered, controlnets, latents, (captions[0], captions[1]), null, **settings)
            yield entry("ControlNet sampling", f"{size} px", pair, few)


def make_transformers(
    device: torch.device, dtype: torch.dtype, depth: int, **fields: Any
) -> tuple[SanaTransformer, SanaTransformer2DModel]:
    """Ours and diffusers', as wide as Sana-0.6B. `fields`: others of `SanaConfig`."""
    config = replace(PRESETS["sana-0.6b"], depth=depth, **fields)
    return SanaTransformer(config).to(device, dtype), make_peer_transformer(config).to(device, dtype)


def make_peer_transformer(config: SanaConfig) -> SanaTransformer2DModel:
    """diffusers' transformer of this shape."""
    return SanaTransformer2DModel(
        num_attention_heads=config.num_heads,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.dim // config.num_cross_heads,
        cross_attention_dim=config.dim,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
        guidance_embeds=config.guidance_embeds,
    )


def _forward(ours: SanaTransformer, peer: SanaTransformer2DModel, size: int, batch_size: int) -> Pair:
    inputs = make_transformer_inputs(ours, size, batch_size)

    def run_ours() -> Tensor:
        with torch.no_grad():
            return ours(*inputs)

    def run_peer() -> Tensor:
        with torch.no_grad():
            return run_peer_transformer(peer, *inputs)

    return run_ours, run_peer


def run_peer_transformer(
    peer: SanaTransformer2DModel, latents: Tensor, timestep: Tensor, caption_embeds: Tensor, caption_mask: Tensor
) -> Tensor:
    return peer(
        latents,
        encoder_hidden_states=caption_embeds,
        timestep=timestep,
        encoder_attention_mask=caption_mask.long(),
        return_dict=False,
    )[0]


def training_forwards(ours: SanaTransformer, peer: SanaTransformer2DModel, size: int, batch_size: int) -> Pair:
    """Forwards that keep what a backward needs."""
    inputs = make_transformer_inputs(ours, size, batch_size)
    return lambda: ours(*inputs), lambda: run_peer_transformer(peer, *inputs)


def _training(ours: SanaTransformer, peer: SanaTransformer2DModel, size: int, batch_size: int) -> Pair:
    """Forward and backward, gradients of all weights."""
    forward_ours, forward_peer = training_forwards(ours, peer, size, batch_size)

    def run_ours() -> None:
        ours.zero_grad()
        forward_ours().float().square().mean().backward()

    def run_peer() -> None:
        peer.zero_grad()
        forward_peer().float().square().mean().backward()

    return run_ours, run_peer


def _sampling(ours: SanaTransformer, peer: SanaTransformer2DModel, size: int, batch_size: int) -> Pair:
    """20 steps of Flow-DPM-Solver with guidance, from caption embeddings to latents."""
    ours.zero_grad(set_to_none=True)
    peer.zero_grad(set_to_none=True)
    latents, _, *captions = make_transformer_inputs(ours, size, batch_size)
    device, dtype = latents.device, latents.dtype
    null_embeds, null_mask = make_captions(batch_size, device, dtype, real=1)

    def run_ours() -> Tensor:
        with torch.inference_mode():
            null = (null_embeds[:1], null_mask[:1])
            velocity = guided_velocity(ours, (captions[0], captions[1]), null, guidance_scale=GUIDANCE_SCALE)
            return flow_dpm_solver(velocity, latents, sampling_sigmas(NUM_STEPS, FLOW_SHIFT))

    pair = (captions[0], captions[1])
    return run_ours, make_peer_sampling(peer, latents, pair, (null_embeds, null_mask), NUM_STEPS)


def make_peer_sampling(
    peer: SanaTransformer2DModel, latents: Tensor, captions: Caption, null: Caption, num_steps: int
) -> Callable[[], Tensor]:
    """diffusers' pipeline, from noise (B, C, h, w) and B captions and null captions to latents."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=FLOW_SHIFT)
    pipeline = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=peer, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: (
        pipeline(
            negative_prompt=None,
            prompt_embeds=captions[0],
            prompt_attention_mask=captions[1].long(),
            negative_prompt_embeds=null[0],
            negative_prompt_attention_mask=null[1].long(),
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE_SCALE,
            height=latents.shape[2] * 32,
            width=latents.shape[3] * 32,
            latents=latents.float(),
            use_resolution_binning=False,
            output_type="latent",
        ).images
    )


def _autoencoder(device: torch.device, dtype: torch.dtype, size: int, batch_size: int) -> dict[str, Pair]:
    """f32c32-sana-1.1."""
    ours = DCAutoencoder.from_preset("dc-ae-f32c32-sana-1.1").to(device, dtype).eval()
    peer = make_peer_autoencoder(ours.config.scaling_factor).to(device, dtype).eval()
    image = torch.rand(batch_size, 3, size, size, device=device, dtype=dtype) * 2 - 1
    latents = torch.randn(batch_size, 32, size // 32, size // 32, device=device, dtype=dtype)
    no_grad = torch.no_grad()
    return {
        "encode": (no_grad(lambda: ours.encode(image)), no_grad(lambda: peer.encode(image).latent)),
        "decode": (no_grad(lambda: ours.decode(latents)), no_grad(lambda: peer.decode(latents).sample)),
    }


def make_peer_autoencoder(scaling_factor: float) -> AutoencoderDC:
    """diffusers' f32c32-sana-1.1."""
    stages: Any = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return AutoencoderDC(
        encoder_block_types=stages,
        decoder_block_types=stages,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=scaling_factor,
    )


def make_text(device: torch.device, dtype: torch.dtype, depth: int, count: int) -> Pair:
    """Captions of 60 tokens behind an instruction, against the padded computation over all 540 tokens."""
    encoder, captions = make_text_encoder(device, dtype, depth, count)
    assert encoder.encode(captions)[0].shape[1] == CAPTION_TOKENS
    pipeline = SanaPipeline(tokenizer=encoder.tokenizer, text_encoder=encoder.model, vae=None, transformer=None, scheduler=None)

    def run_peer() -> Tensor:
        with torch.no_grad():
            return pipeline.encode_prompt(captions, False, complex_human_instruction=[encoder.config.instruction])[0]

    return lambda: encoder.encode(captions), run_peer
