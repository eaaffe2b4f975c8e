"""`sana_model` against diffusers 0.42, part by part, with random weights of the published shapes."""

import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import diffusers
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from jobs.benchmark.config import ModelConfig
from jobs.benchmark.timing import Entry, format_timings, time_entry
from jobs.benchmark.variants import SPRINT_FIELDS, Pair, controlnet_sampling, make_controlnets, sprint_sampling
from sana_model.guidance import guided_velocity
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import PRESETS, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.solver import flow_dpm_solver, sampling_sigmas

CAPTION_TOKENS, PADDED_TOKENS = 60, 300
INSTRUCTION_TOKENS = 242  # with them the published computation runs over 540 tokens
NUM_STEPS, GUIDANCE_SCALE, FLOW_SHIFT = 20, 4.5, 3.0


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
            latents, _, *captions = _transformer_inputs(sprints[0], size, config.batch_size)
            pair = sprint_sampling(*sprints, latents, (captions[0], captions[1]), GUIDANCE_SCALE)
            yield entry("Sprint 2 steps", f"{size} px", pair, config.repeats)
        del sprints
    if "controlnet" in config.parts:
        steered = make_transformers(device, dtype, max(config.depth, 2))
        controlnets = make_controlnets(*steered)
        for size in config.sizes:
            latents, _, *captions = _transformer_inputs(steered[0], size, config.batch_size)
            null = _captions(config.batch_size, device, dtype, real=1)
            settings: dict[str, Any] = {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "flow_shift": FLOW_SHIFT}
            pair = controlnet_sampling(steered, controlnets, latents, (captions[0], captions[1]), null, **settings)
            yield entry("ControlNet sampling", f"{size} px", pair, few)


def make_transformers(
    device: torch.device, dtype: torch.dtype, depth: int, **fields: Any
) -> tuple[SanaTransformer, SanaTransformer2DModel]:
    """Ours and diffusers', as wide as Sana-0.6B. `fields`: others of `SanaConfig`."""
    config = replace(PRESETS["sana-0.6b"], **fields)
    peer = SanaTransformer2DModel(
        num_attention_heads=config.num_heads,
        num_layers=depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.dim // config.num_cross_heads,
        cross_attention_dim=config.dim,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
        guidance_embeds=config.guidance_embeds,
    )
    return SanaTransformer(replace(config, depth=depth)).to(device, dtype), peer.to(device, dtype)


def _captions(batch_size: int, device: torch.device, dtype: torch.dtype, real: int = CAPTION_TOKENS) -> tuple[Tensor, Tensor]:
    embeds = torch.randn(batch_size, PADDED_TOKENS, PRESETS["sana-0.6b"].caption_dim, device=device, dtype=dtype)
    return embeds, (torch.arange(PADDED_TOKENS, device=device) < real).expand(batch_size, -1)


def _transformer_inputs(ours: SanaTransformer, size: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = ours.head.weight
    latents = torch.randn(batch_size, 32, size // 32, size // 32, device=weight.device, dtype=weight.dtype)
    timestep = torch.full((batch_size,), 500.0, device=weight.device)
    return latents, timestep, *_captions(batch_size, weight.device, weight.dtype)


def _forward(ours: SanaTransformer, peer: SanaTransformer2DModel, size: int, batch_size: int) -> Pair:
    inputs = _transformer_inputs(ours, size, batch_size)

    def run_ours() -> Tensor:
        with torch.no_grad():
            return ours(*inputs)

    def run_peer() -> Tensor:
        with torch.no_grad():
            return _run_peer(peer, *inputs)

    return run_ours, run_peer


def _run_peer(
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
    inputs = _transformer_inputs(ours, size, batch_size)
    return lambda: ours(*inputs), lambda: _run_peer(peer, *inputs)


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
    latents, _, *captions = _transformer_inputs(ours, size, batch_size)
    device, dtype = latents.device, latents.dtype
    null_embeds, null_mask = _captions(batch_size, device, dtype, real=1)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=FLOW_SHIFT)
    pipeline = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=peer, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def run_ours() -> Tensor:
        with torch.inference_mode():
            null = (null_embeds[:1], null_mask[:1])
            velocity = guided_velocity(ours, (captions[0], captions[1]), null, guidance_scale=GUIDANCE_SCALE)
            return flow_dpm_solver(velocity, latents, sampling_sigmas(NUM_STEPS, FLOW_SHIFT))

    def run_peer() -> Tensor:
        return pipeline(
            negative_prompt=None,
            prompt_embeds=captions[0],
            prompt_attention_mask=captions[1].long(),
            negative_prompt_embeds=null_embeds,
            negative_prompt_attention_mask=null_mask.long(),
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            height=size,
            width=size,
            latents=latents.float(),
            use_resolution_binning=False,
            output_type="latent",
        ).images

    return run_ours, run_peer


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
    words = [f"w{index}" for index in range(1000)]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *words])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    config = Gemma2Config(vocab_size=len(vocabulary), num_hidden_layers=depth, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model: Any = Gemma2Model(config)  # hidden 2304, feed-forward 9216: gemma-2-2b
    model = model.to(device, dtype).eval()
    instruction = " ".join(words[: INSTRUCTION_TOKENS - 1]) + " "
    # The instruction's last token and BOS are kept too, so a caption of 58 words fills 60 places.
    captions = [" ".join(words[300 + index : 300 + index + CAPTION_TOKENS - 2]) for index in range(count)]
    encoder = TextEncoder(model, tokenizer, TextEncoderConfig(instruction=instruction))
    assert encoder.encode(captions)[0].shape[1] == CAPTION_TOKENS
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)

    def run_peer() -> Tensor:
        with torch.no_grad():
            return pipeline.encode_prompt(captions, False, complex_human_instruction=[instruction])[0]

    return lambda: encoder.encode(captions), run_peer
