"""The linear DiT of Sana (arXiv 2410.10629) and Sana 1.5 (2501.18427)."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana_model.kernels.linear import Linear
from sana_model.kernels.modulate import modulate
from sana_model.nn.captions import CaptionState, check_captions, encode_captions, project_captions
from sana_model.nn.config import PRESETS, SanaConfig
from sana_model.nn.embeddings import CaptionProjection, PatchEmbed, TimestepEmbedding, add_positions
from sana_model.nn.transformer_blocks import CaptionMemory, CaptionTokens, SanaBlock

AfterBlock = Callable[[int, Tensor, Tensor], Tensor]
"""(index of a block, its tokens (B, N, D), modulation (B, 6, D)) -> the tokens that go on."""


class SanaTransformer(nn.Module):
    """The linear DiT: predicts the velocity eps - x0 of noisy latents, given the timestep and the caption."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time_embed = TimestepEmbedding(dim, config.time_input, guidance=config.guidance_embeds)
        self.caption_proj = CaptionProjection(config.caption_dim, dim, norm=config.caption_norm)
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.depth))
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

    @property
    def logvar(self) -> dict[str, Tensor]:
        """The layer that only the training of Sana-Sprint uses, by its attributes here; {} if the file had none."""
        found = {"logvar_weight": self.logvar_weight, "logvar_bias": self.logvar_bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

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
        *,
        after_block: AfterBlock | None = None,
    ) -> Tensor:
        """Predict velocity, (B, C, H, W), the shape of `latents`.

        Args:
            latents: noisy latents (B, C, H, W), any H and W that divide by the patch size.
            timestep: (B,), 1000 * sigma; `config.time_input` says what is made of it.
            caption_embeds: the text encoder's output (B, L, caption_dim); or what `encode_captions` made of it; or its real
                tokens, already projected to the model's width.
            caption_mask: (B, L), nonzero at real tokens; None: all are real.
            guidance_scale: (B,), for models with `config.guidance_embeds`, and for no others.
            after_block: may change the tokens after each block, as a ControlNet does.

        Raises ValueError if a shape does not fit, or if guidance_scale is missing or too much.
        """
        batch_size, channels, height, width = self._check_latents(latents, timestep, guidance_scale)
        patch = self.config.patch_size
        size = (height // patch, width // patch)
        caption: CaptionState | CaptionTokens
        if isinstance(caption_embeds, CaptionState | CaptionTokens):
            caption = caption_embeds
        else:
            real = check_captions(caption_embeds, caption_mask, self.config.caption_dim)
            caption = project_captions(self.caption_proj, caption_embeds, real)
        if caption.batch_size != batch_size:
            raise ValueError(f"{caption.batch_size} captions came with {batch_size} latents: give one to each")

        tokens = add_positions(self.patch_embed(latents), size, self.config)  # (B, H*W, D)
        time_embedding, modulation = self.time_embed(timestep, guidance_scale)  # (B, D), (B, 6, D)
        for index, (block, block_caption) in enumerate(zip(self.blocks, self._per_block(caption), strict=True)):
            arguments = (tokens, modulation, block_caption, caption.attention_mask, size)
            if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens = block(*arguments)
            if after_block is not None:
                tokens = after_block(index, tokens, modulation)

        shift, scale = (time_embedding[:, None] + self.final_modulation).chunk(2, dim=1)
        patches = self.head(modulate(tokens, shift, scale))  # (B, H*W, p*p*C)
        patches = patches.view(batch_size, *size, patch, patch, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, channels, height, width)

    def encode_captions(self, caption_embeds: Tensor, caption_mask: Tensor | None = None) -> CaptionState:
        """Compute once what every block needs of the captions; give it to `forward` at each step in place of the embeddings.

        Takes (B, L, caption_dim) and (B, L) as `forward` does, and raises the same errors. Captions of one token, such as the
        null caption, cost next to nothing if they come first in the batch.
        """
        return encode_captions(self.caption_proj, self._blocks(), caption_embeds, caption_mask)

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

    def _per_block(self, caption: CaptionTokens | CaptionState) -> Iterable[CaptionTokens | CaptionMemory]:
        return caption.memories if isinstance(caption, CaptionState) else [caption] * len(self.blocks)

    def _blocks(self) -> Iterable[SanaBlock]:
        return cast(Iterable[SanaBlock], self.blocks)

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
