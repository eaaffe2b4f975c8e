"""Pair tiny models of ours with diffusers' models of the same shapes, with weights that make every part count."""

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from sana_model.nn.config import AUTOENCODER_PRESETS, AutoencoderConfig, SanaConfig

TINY = SanaConfig(dim=64, depth=2, num_cross_heads=4, ffn_dim=160, in_channels=8, caption_dim=48, base_size=8)


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize all values, also norms, biases, modulations and batch statistics, so that no default hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
                offset = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5 + offset)
    return model.eval()


def diffusers_transformer(config: SanaConfig, seed: int = 0) -> SanaTransformer2DModel:
    model = SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=32,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.dim // config.num_cross_heads,
        cross_attention_dim=config.dim,
        caption_channels=config.caption_dim,
        mlp_ratio=config.ffn_dim / config.dim,
        sample_size=config.base_size * config.patch_size,
        patch_size=config.patch_size,
        interpolation_scale=config.position_scale,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
        guidance_embeds=config.guidance_embeds,
    )
    return scramble(model, seed)


def shrink(config: AutoencoderConfig, channels: int = 16) -> AutoencoderConfig:
    """Shrink a published family to narrow stages of at most one block; compression factor and layout stay."""
    from dataclasses import replace

    narrow = tuple(
        max(width * channels // 128, 32) if index > 2 else width * channels // 128 for index, width in enumerate(config.widths)
    )
    return replace(
        config,
        latent_channels=8,
        widths=narrow,
        encoder_depths=tuple(min(depth, 1) for depth in config.encoder_depths),
        decoder_depths=tuple(min(depth, 1) for depth in config.decoder_depths),
    )


FAMILIES = {name: shrink(AUTOENCODER_PRESETS[name]) for name in AUTOENCODER_PRESETS if name.endswith(("in-1.0", "sana-1.1"))}
LITE = "dc-ae-lite-f32c32-sana-1.1"


def diffusers_autoencoder(config: AutoencoderConfig, seed: int = 0) -> AutoencoderDC:
    """Write out what `diffusers` documents of each published family, without our own config translation."""
    stages, family_in, lite = len(config.widths), config.variant == "in", config.decoder_variant == "lite"
    late = stages - 3
    scales = ((),) * stages if family_in else ((),) * 3 + ((5,),) * late
    model = AutoencoderDC(
        latent_channels=config.latent_channels,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * late,
        decoder_block_types="ResBlock" if lite else ("ResBlock",) * 3 + ("EfficientViTBlock",) * late,
        encoder_block_out_channels=config.widths,
        decoder_block_out_channels=config.widths,
        encoder_layers_per_block=config.encoder_depths,
        decoder_layers_per_block=config.decoder_depths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="pixel_unshuffle" if family_in else "conv",
        upsample_block_type="pixel_shuffle" if family_in or lite else "interpolate",
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * late if family_in else "rms_norm",
        decoder_act_fns=("relu",) * 3 + ("silu",) * late if family_in else "silu",
        decoder_conv_act_fn="silu" if lite else "relu",
        scaling_factor=config.scaling_factor,
    )
    return scramble(model, seed)


def nvlabs_shapes(config: SanaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer's tensors in NVlabs' code (diffusion/model/nets/sana_multi_scale.py)."""
    dim, ffn, caption = config.dim, config.ffn_dim, config.caption_dim
    linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}  # noqa: E731
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.base_size**2, dim),
        "y_embedder.y_embedding": (300, caption),
        "x_embedder.proj.weight": (dim, config.in_channels, 1, 1),
        "x_embedder.proj.bias": (dim,),
        **linear("t_embedder.mlp.0", dim, 256),
        **linear("t_embedder.mlp.2", dim, dim),
        **linear("t_block.1", 6 * dim, dim),
        **linear("y_embedder.y_proj.fc1", dim, caption),
        **linear("y_embedder.y_proj.fc2", dim, dim),
        "attention_y_norm.weight": (dim,),
        **linear("final_layer.linear", config.in_channels, dim),
        "final_layer.scale_shift_table": (2, dim),
    }
    for i in range(config.depth):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.scale_shift_table": (6, dim),
            f"{block}.attn.qkv.weight": (3 * dim, dim),
            **linear(f"{block}.attn.proj", dim, dim),
            **linear(f"{block}.cross_attn.q_linear", dim, dim),
            **linear(f"{block}.cross_attn.kv_linear", 2 * dim, dim),
            **linear(f"{block}.cross_attn.proj", dim, dim),
            f"{block}.mlp.inverted_conv.conv.weight": (2 * ffn, dim, 1, 1),
            f"{block}.mlp.inverted_conv.conv.bias": (2 * ffn,),
            f"{block}.mlp.depth_conv.conv.weight": (2 * ffn, 1, 3, 3),
            f"{block}.mlp.depth_conv.conv.bias": (2 * ffn,),
            f"{block}.mlp.point_conv.conv.weight": (dim, ffn, 1, 1),
        }
        if config.qk_norm:
            norms = (f"{block}.{part}.{name}_norm.weight" for part in ("attn", "cross_attn") for name in "qk")
            shapes |= {name: (dim,) for name in norms}
    if config.guidance_embeds:
        shapes |= linear("cfg_embedder.mlp.0", dim, 256) | linear("cfg_embedder.mlp.2", dim, dim)
        shapes |= linear("logvar_linear", 1, dim)
    if not config.caption_norm:
        del shapes["attention_y_norm.weight"]
    return shapes


def nvlabs_state(config: SanaConfig) -> dict[str, torch.Tensor]:
    """A random state dict in NVlabs' layout, of a model without positional embedding."""
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.randn(shape, generator=generator) for name, shape in nvlabs_shapes(config).items()}
    state["pos_embed"].zero_()
    return state


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Check that the largest difference is within `tolerance` of the scale of `theirs`."""
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().item()
    assert scale > 1e-3, f"the reference is all but zero ({scale:.1e}): the comparison would say nothing"
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance * scale, f"differs by {difference:.2e}, {difference / scale:.2e} of the scale"
