"""The linear DiT of Sana (arXiv 2410.10629) and Sana 1.5 (2501.18427)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana_model.kernels.linear import Linear
from sana_model.nn.config import PRESETS, SanaConfig
from sana_model.nn.embeddings import CaptionProjection, PatchEmbed, TimestepEmbedding, sincos_position_embedding
from sana_model.nn.transformer_blocks import CaptionMemory, CaptionTokens, SanaBlock, modulate


@dataclass(frozen=True)
class CaptionState:
    """A batch of captions as the blocks use it, computed once by `SanaTransformer.encode_captions`."""

    batch_size: int
    num_single: int
    """Number of captions at the front of the batch that have one token, as the null caption does."""
    memories: list[CaptionMemory]
    """One per block."""
    attention_mask: Tensor | None
    """(B - num_single, 1, 1, L), False at padding; None where no caption is padded."""

    def without_first(self, count: int) -> "CaptionState":
        """The state of the captions after the first `count`."""
        dropped_single = min(count, self.num_single)
        dropped_others = count - dropped_single
        memories = [memory.drop(dropped_single, dropped_others) for memory in self.memories]
        mask = None if self.attention_mask is None else self.attention_mask[dropped_others:]
        return CaptionState(self.batch_size - count, self.num_single - dropped_single, memories, mask)


class SanaTransformer(nn.Module):
    """The linear DiT: predicts the velocity eps - x0 of noisy latents, given the timestep and the caption."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time_embed = TimestepEmbedding(dim, config.time_input, guidance=config.guidance_embeds)
        self.caption_proj = CaptionProjection(config.caption_dim, dim, norm=config.caption_norm)
        self.blocks = nn.ModuleList(
            SanaBlock(
                dim,
                num_heads=config.num_heads,
                num_cross_heads=config.num_cross_heads,
                ffn_dim=config.ffn_dim,
                qk_norm=config.qk_norm,
                cross_qk_norm=config.cross_qk_norm,
            )
            for _ in range(config.depth)
        )
        self.final_modulation = nn.Parameter(torch.empty(2, dim))
        self.head = Linear(dim, config.patch_size**2 * config.in_channels)
        self.checkpoint_every = 0
        # From an NVlabs file: the null caption's embeddings (300, caption_dim), and a linear layer that the training of
        # Sana-Sprint uses. The model does not use them; saving keeps them.
        self.null_caption_embeds: Tensor | None
        self.logvar_weight: Tensor | None
        self.logvar_bias: Tensor | None
        for name in ("null_caption_embeds", "logvar_weight", "logvar_bias"):
            self.register_buffer(name, None, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SanaTransformer":
        """Make a freshly initialised model of a published shape, e.g. `from_preset("sana-0.6b", depth=4)`.

        Raises ValueError for an unknown name, TypeError for an unknown override.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(replace(PRESETS[name], **overrides))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, use_ema: bool = False, dtype: torch.dtype | None = None, **overrides: Any
    ) -> "SanaTransformer":
        """Load our own, a diffusers or an NVlabs checkpoint: see `files.models.load_transformer`."""
        from sana_model.files.models import load_transformer

        return load_transformer(path, use_ema=use_ema, dtype=dtype, **overrides)

    def save_pretrained(self, path: str | Path, *, layout: str = "sana") -> None:
        """Write the weights in the layout "sana", "diffusers" or "nvlabs": see `files.models.save_transformer`."""
        from sana_model.files.models import save_transformer

        save_transformer(self, path, layout=layout)

    def enable_gradient_checkpointing(self, every: int = 1) -> None:
        """Recompute every `every`-th block in the backward pass instead of keeping its activations; 0 turns it off.

        Raises ValueError if `every` is negative.
        """
        if every < 0:
            raise ValueError(f"every={every} must be 0 (off) or a positive number of blocks")
        self.checkpoint_every = every

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption_embeds: Tensor | CaptionState | CaptionTokens,
        caption_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Predict velocity, (B, C, H, W), the shape of `latents`.

        Args:
            latents: noisy latents (B, C, H, W), any H and W that divide by the patch size.
            timestep: (B,), 1000 * sigma; `config.time_input` says what is made of it.
            caption_embeds: the text encoder's output (B, L, caption_dim); or what `encode_captions` made of it; or its real
                tokens, already projected to the model's width.
            caption_mask: (B, L), nonzero at real tokens; None: all are real.
            guidance_scale: (B,), for models with `config.guidance_embeds`, and for no others.

        Raises ValueError if a shape does not fit, or if guidance_scale is missing or too much.
        """
        batch_size, channels, height, width = self._check_latents(latents, timestep, guidance_scale)
        patch = self.config.patch_size
        size = (height // patch, width // patch)
        caption: CaptionState | CaptionTokens
        if isinstance(caption_embeds, CaptionState | CaptionTokens):
            caption = caption_embeds
        else:
            caption = self._project_captions(caption_embeds, self._check_captions(caption_embeds, caption_mask))
        if caption.batch_size != batch_size:
            raise ValueError(f"{caption.batch_size} captions came with {batch_size} latents: give one to each")

        tokens = self._add_positions(self.patch_embed(latents), size)  # (B, H*W, D)
        time_embedding, modulation = self.time_embed(timestep, guidance_scale)  # (B, D), (B, 6, D)
        for index, (block, block_caption) in enumerate(zip(self.blocks, self._per_block(caption), strict=True)):
            arguments = (tokens, modulation, block_caption, caption.attention_mask, size)
            if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens = block(*arguments)

        shift, scale = (time_embedding[:, None] + self.final_modulation).chunk(2, dim=1)
        patches = self.head(modulate(tokens, shift, scale))  # (B, H*W, p*p*C)
        patches = patches.view(batch_size, *size, patch, patch, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, channels, height, width)

    def encode_captions(self, caption_embeds: Tensor, caption_mask: Tensor | None = None) -> CaptionState:
        """Compute once what every block needs of the captions; give it to `forward` at each step in place of the embeddings.

        Takes (B, L, caption_dim) and (B, L) as `forward` does, and raises the same errors. Captions of one token, such as the
        null caption, cost next to nothing if they come first in the batch.
        """
        real = self._check_captions(caption_embeds, caption_mask)
        num_single = int((real.sum(dim=1) == 1).int().cumprod(dim=0).sum())
        single = self._project_captions(caption_embeds[:num_single], real[:num_single]) if num_single else None
        caption = self._project_captions(caption_embeds[num_single:], real[num_single:]) if num_single < len(real) else None
        memories = [block.cross_attention.remember(caption, single) for block in self._blocks()]
        return CaptionState(len(real), num_single, memories, caption.attention_mask if caption else None)

    def _check_latents(self, latents: Tensor, timestep: Tensor, guidance_scale: Tensor | None) -> torch.Size:
        channels, patch = self.config.in_channels, self.config.patch_size
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: this model takes (B, {channels}, H, W)")
        if latents.shape[2] % patch or latents.shape[3] % patch:
            raise ValueError(f"latents of {latents.shape[2]}x{latents.shape[3]} must divide by patch_size={patch}")
        if timestep.shape != latents.shape[:1]:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}: give ({latents.shape[0]},), one per image")
        if (guidance_scale is not None) != self.config.guidance_embeds:
            takes = "takes guidance_scale=, (B,)" if self.config.guidance_embeds else "takes no guidance_scale"
            raise ValueError(f"this model {takes}: its config has guidance_embeds={self.config.guidance_embeds}")
        if guidance_scale is not None and guidance_scale.shape != latents.shape[:1]:
            raise ValueError(f"guidance_scale has shape {tuple(guidance_scale.shape)}: give ({latents.shape[0]},)")
        return latents.shape

    def _check_captions(self, caption_embeds: Tensor, caption_mask: Tensor | None) -> Tensor:
        """Check shapes and return the mask as bool (B, L)."""
        if caption_embeds.ndim != 3 or caption_embeds.shape[-1] != self.config.caption_dim:
            raise ValueError(
                f"caption_embeds have shape {tuple(caption_embeds.shape)}: this model takes (B, L, {self.config.caption_dim})"
            )
        shape = caption_embeds.shape[:2]
        if caption_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=caption_embeds.device)
        if caption_mask.shape != shape:
            raise ValueError(f"caption_mask has shape {tuple(caption_mask.shape)}, caption_embeds {tuple(shape)}")
        real = caption_mask != 0
        if not real.any(dim=1).all():
            raise ValueError("caption_mask masks every token of a caption: the null caption too has one (the BOS token)")
        return real

    def _project_captions(self, caption_embeds: Tensor, real: Tensor) -> CaptionTokens:
        """Project captions (B, L, caption_dim) to the model's width, real tokens only."""
        last = int(real.any(dim=0).nonzero().max()) + 1  # a column that is padding in every caption is dropped
        real, caption_embeds = real[:, :last], caption_embeds[:, :last]
        positions = real.flatten().nonzero().squeeze(1)
        packed = self.caption_proj(caption_embeds.flatten(0, 1).index_select(0, positions))
        attention_mask = None if len(positions) == real.numel() else real[:, None, None]
        return CaptionTokens(packed, positions, attention_mask, len(real), last)

    def _per_block(self, caption: CaptionTokens | CaptionState) -> Iterable[CaptionTokens | CaptionMemory]:
        return caption.memories if isinstance(caption, CaptionState) else [caption] * len(self.blocks)

    def _blocks(self) -> Iterable[SanaBlock]:
        return cast(Iterable[SanaBlock], self.blocks)

    def _add_positions(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        config = self.config
        if config.position_scale is None:
            return tokens
        positions = sincos_position_embedding(config.dim, *size, config.base_size, config.position_scale)
        return tokens + positions.to(tokens.device, tokens.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: Xavier for linear layers, N(0, 0.02^2) for the time and caption MLPs.

        No layer is zero, but the last one of the guidance scale.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.RMSNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and "ffn" not in name:  # the FFN's 1x1 are convolutions there
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for linear in (
            self.time_embed.linear_1,
            self.time_embed.linear_2,
            self.time_embed.modulation,
            self.caption_proj.linear_1,
            self.caption_proj.linear_2,
        ):
            nn.init.normal_(linear.weight, std=0.02)
        if self.config.caption_norm:
            nn.init.constant_(cast(nn.RMSNorm, self.caption_proj.norm).weight, 0.01)
        if self.config.guidance_embeds:
            nn.init.normal_(self.time_embed.guidance_1.weight, std=0.02)
            nn.init.zeros_(self.time_embed.guidance_2.weight)
        for table in (*(block.modulation for block in self._blocks()), self.final_modulation):
            nn.init.normal_(table, std=self.config.dim**-0.5)
