"""ControlNet for the linear DiT: copies of its first blocks see a control picture's latents, and steer it.

NVlabs' code and diffusers compute different functions. Weights are to be used with the one that they were trained with:
`ControlNetConfig.form`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sana_model.kernels.linear import Linear
from sana_model.nn.captions import CaptionState, encode_captions
from sana_model.nn.config import ControlForm, ControlNetConfig
from sana_model.nn.embeddings import CaptionProjection, PatchEmbed, TimestepEmbedding, add_positions
from sana_model.nn.quantized import precision_of
from sana_model.nn.transformer import AfterBlock, SanaTransformer
from sana_model.nn.transformer_blocks import SanaBlock


@dataclass(frozen=True)
class ControlState:
    """What a ControlNet computes once for all steps of a drawing, by `SanaControlNet.prepare`."""

    controlnet: "SanaControlNet"
    tokens: Tensor
    """(B, N, D) of the control pictures, projected."""
    captions: CaptionState
    scale: float

    def without_first(self, count: int) -> "ControlState":
        """The state of the samples after the first `count`."""
        return ControlState(self.controlnet, self.tokens[count:], self.captions.without_first(count), self.scale)


@dataclass(frozen=True)
class Control:
    """A ControlNet with the latents (B, C, H, W) of a control picture for each sample, and the conditioning scale."""

    controlnet: "SanaControlNet"
    latents: Tensor
    scale: float = 1.0


class SanaControlNet(nn.Module):
    """Steers a `SanaTransformer` by the latents of a control picture (edges, depth, ...).

    The first of its blocks sees the noisy picture's tokens plus the projected control tokens, each other block the tokens of
    the one before it. What each block makes, projected and scaled, is added to the transformer's tokens.

    - "nvlabs": the noisy tokens are those after the transformer's first block, the embeddings are the transformer's own, and
      block i is added after the transformer's block i.
    - "diffusers": the noisy tokens are the embedded latents, all embeddings are the ControlNet's own, and block i is added
      after the transformer's block i + 1.
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        if config.form == "diffusers":
            self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
            self.time_embed = TimestepEmbedding(dim, config.time_input, guidance=False)
            self.caption_proj = CaptionProjection(config.caption_dim, dim, norm=config.caption_norm)
        self.control_proj = Linear(dim, dim)
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.depth))
        self.outputs = nn.ModuleList(Linear(dim, dim) for _ in range(config.depth))

    @classmethod
    def from_transformer(
        cls, transformer: SanaTransformer, *, depth: int = 7, form: ControlForm = "nvlabs"
    ) -> "SanaControlNet":
        """Make a ControlNet to be trained: copies of the first blocks, and zeros for projections, which change nothing.

        Raises ValueError if the transformer has no more than `depth` blocks, or is quantized.
        """
        if (precision := precision_of(transformer)) != "full":
            raise ValueError(f"a ControlNet is made of a transformer in full precision, and this one is {precision}")
        if not 0 < depth < transformer.config.depth:
            raise ValueError(f"depth={depth} must be at least 1, and less than the transformer's {transformer.config.depth}")
        model = cls(ControlNetConfig(**{**asdict(transformer.config), "depth": depth, "form": form}))
        state = {name: value for name, value in transformer.state_dict().items() if name in model.state_dict()}
        model.load_state_dict(state, strict=False)
        for projection in (model.control_proj, *model.outputs):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
        return model.to(transformer.head.weight.device, transformer.head.weight.dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        form: ControlForm | None = None,
        num_cross_heads: int | None = None,
        use_ema: bool = False,
    ) -> "SanaControlNet":
        """Load our own, a diffusers or an NVlabs checkpoint: see `files.controlnet.load_controlnet`."""
        from sana_model.files.controlnet import load_controlnet

        return load_controlnet(path, dtype=dtype, form=form, num_cross_heads=num_cross_heads, use_ema=use_ema)

    def save_pretrained(self, path: str | Path, *, layout: str = "sana", transformer: SanaTransformer | None = None) -> None:
        """Write the weights in the layout "sana", "diffusers" or "nvlabs": see `files.controlnet.save_controlnet`."""
        from sana_model.files.controlnet import save_controlnet

        save_controlnet(self, path, layout=layout, transformer=transformer)

    def prepare(
        self,
        transformer: SanaTransformer,
        control_latents: Tensor,
        caption_embeds: Tensor,
        caption_mask: Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> ControlState:
        """Compute once what does not change from step to step; give it to `steer`.

        Args:
            transformer: the one that is steered.
            control_latents: (B, C, H, W), the control pictures as the autoencoder encodes them.
            caption_embeds, caption_mask: as in `SanaTransformer.forward`.
            scale: the conditioning scale; 0 steers nothing.

        Raises ValueError if the transformer or a shape does not fit.
        """
        self._check(transformer, control_latents)
        patch, size = self.config.patch_size, control_latents.shape[2:]
        own = transformer if self.config.form == "nvlabs" else self
        tokens = own.patch_embed(control_latents)
        if self.config.form == "diffusers":
            tokens = add_positions(tokens, (size[0] // patch, size[1] // patch), self.config)
        captions = encode_captions(own.caption_proj, self._blocks(), caption_embeds, caption_mask)
        return ControlState(self, self.control_proj(tokens), captions, scale)

    def steer(self, latents: Tensor, timestep: Tensor, state: ControlState) -> AfterBlock:
        """Make the argument `after_block` of the transformer's forward, which takes the same `latents` and `timestep`.

        Raises ValueError if the control pictures are of another size or number than the latents.
        """
        patch = self.config.patch_size
        size = (latents.shape[2] // patch, latents.shape[3] // patch)
        if state.tokens.shape[:2] != (len(latents), size[0] * size[1]):
            raise ValueError(
                f"control pictures of {tuple(state.tokens.shape[:2])} (number, tokens) came with latents of "
                f"{(len(latents), size[0] * size[1])}: they must be equal"
            )
        if self.config.form == "nvlabs":
            return self._steer_as_nvlabs(size, state)
        tokens = add_positions(self.patch_embed(latents), size, self.config)
        outputs = self._run(tokens, self.time_embed(timestep)[1], size, state)

        def after_block(index: int, tokens: Tensor, modulation: Tensor) -> Tensor:
            return tokens + outputs[index - 1] if 0 < index <= len(outputs) else tokens

        return after_block

    def _steer_as_nvlabs(self, size: tuple[int, int], state: ControlState) -> AfterBlock:
        outputs: list[Tensor] = []

        def after_block(index: int, tokens: Tensor, modulation: Tensor) -> Tensor:
            if index == 0:
                outputs[:] = self._run(tokens, modulation, size, state)
            return tokens + outputs[index] if index < len(outputs) else tokens

        return after_block

    def _run(self, tokens: Tensor, modulation: Tensor, size: tuple[int, int], state: ControlState) -> list[Tensor]:
        """What is added to the transformer's tokens, from the noisy picture's tokens (B, N, D): one (B, N, D) of each block."""
        tokens, outputs = tokens + state.tokens, []
        for block, output, caption in zip(self._blocks(), self.outputs, state.captions.memories, strict=True):
            tokens = block(tokens, modulation, caption, state.captions.attention_mask, size)
            outputs.append(output(tokens) * state.scale)
        return outputs

    def _check(self, transformer: SanaTransformer, control_latents: Tensor) -> None:
        own, other = self.config, transformer.config
        for name in ("dim", "in_channels", "patch_size", "caption_dim"):
            if getattr(own, name) != getattr(other, name):
                raise ValueError(
                    f"the ControlNet has {name}={getattr(own, name)}, the transformer {getattr(other, name)}: "
                    "they do not belong together"
                )
        if own.depth >= other.depth:
            raise ValueError(f"a ControlNet of {own.depth} blocks steers a transformer of more blocks, not of {other.depth}")
        if control_latents.ndim != 4 or control_latents.shape[1] != own.in_channels:
            raise ValueError(f"control_latents have shape {tuple(control_latents.shape)}: give (B, {own.in_channels}, H, W)")

    def _blocks(self) -> Iterable[SanaBlock]:
        return cast(Iterable[SanaBlock], self.blocks)
