"""Text to image: text encoder, linear DiT, solver and DC-AE put together."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from sana_model.arguments import (
    check_size,
    describe_cut,
    image_seeds,
    interval,
    nearest_multiple,
    real_number,
    text,
    whole_number,
)
from sana_model.drawing import choose_solver, draw_latents
from sana_model.files.lora import read_lora
from sana_model.files.pipeline import PipelineParts, load_parts, save_parts
from sana_model.files.png import set_facts
from sana_model.flow import DEFAULT_FLOW_SHIFT, noise_source
from sana_model.guidance import Caption
from sana_model.memory import MemoryMode, Precision, plan_memory
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.controlnet import Control, SanaControlNet
from sana_model.nn.finite import NotFiniteError, check_finite, name_dtype
from sana_model.nn.lora import attach_changes, detach_changes, merge_changes
from sana_model.nn.quantized import precision_of
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.offload import Offload, bring
from sana_model.pictures import ControlPictures, GuidePictures, Pictures, StartPictures, decode_pictures
from sana_model.solver import OnEstimate, OnStep


class TextToImage(nn.Module):
    """The whole model as one module: call it with prompts, get pictures. `.to(device)` moves all of it.

    Args:
        flow_shift: shift of the sampling grid. Published: 3.0; 4.0 for 0.6B at 1024 px; 6.0 at 4096 px.
        name: what the pictures' facts call the model; `from_pretrained` puts its path there.
        controlnet: steers the transformer where `forward` gets a control picture; of the transformer's dtype.

    Raises ValueError if the transformer's latent channels or caption width are not those of the other models.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        autoencoder: DCAutoencoder,
        text_encoder: TextEncoder,
        *,
        flow_shift: float = DEFAULT_FLOW_SHIFT,
        name: str | None = None,
        controlnet: SanaControlNet | None = None,
    ):
        super().__init__()
        if transformer.config.in_channels != autoencoder.config.latent_channels:
            raise ValueError(
                f"the transformer works on {transformer.config.in_channels} latent channels, "
                f"the autoencoder makes {autoencoder.config.latent_channels}: they do not belong together"
            )
        if transformer.config.caption_dim != text_encoder.embed_dim:
            raise ValueError(
                f"the transformer takes captions of width {transformer.config.caption_dim}, "
                f"the text encoder gives {text_encoder.embed_dim}: they do not belong together"
            )
        self.transformer = transformer.eval()
        self.autoencoder = autoencoder.eval()
        self.text_encoder = text_encoder
        self.controlnet = None if controlnet is None else controlnet.eval()
        self.flow_shift = flow_shift
        self.name = name
        self.loras: list[dict[str, Any]] = []
        self.offload: Offload | None = getattr(transformer, "offload", None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        use_ema: bool = False,
        autoencoder: str | Path | None = None,
        text_encoder: str | Path | None = None,
        flow_shift: float | None = None,
        variant: str | None = None,
        controlnet: str | Path | SanaControlNet | None = None,
        device: str | torch.device | None = None,
        memory: MemoryMode = "fast",
        precision: Precision | None = None,
        **overrides: Any,
    ) -> "TextToImage":
        """Load our own pipeline folder, diffusers' `SanaPipeline` folder or an NVlabs `.pth`.

        Arguments, and errors raised, are those of `files.pipeline.load_parts`.

        Args:
            controlnet: a ControlNet, or the path of one (`SanaControlNet.from_pretrained`). None: the pipeline's own, if it has
                one.
            device: where pictures are drawn; None: the CPU. With `memory` it must be given here, not to `.to` later.
            memory: how the parts fit that device, see `memory.plan_memory`: "fast", all in full precision; "balanced"; "small".
            precision: of the weights, "w8a8", "int8", "int4", "fp8" or "full"; None: as `memory` says.
        """
        device = torch.device(device or "cpu")
        offload = Offload(plan_memory(memory, precision, device.type), device)
        parts = load_parts(
            path,
            dtype=dtype,
            use_ema=use_ema,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            flow_shift=flow_shift,
            variant=variant,
            controlnet=offload.own(controlnet),
            on_part=offload.take,
            **overrides,
        )
        return cls(
            parts.transformer,
            parts.autoencoder,
            parts.text_encoder,
            flow_shift=parts.flow_shift,
            name=str(path),
            controlnet=parts.controlnet,
        )

    def save_pretrained(self, path: str | Path, *, layout: str = "sana") -> None:
        """Write a folder with all models ("sana", "diffusers"), or a `.pth` file with the transformer alone ("nvlabs").

        Raises ValueError as `files.pipeline.save_parts`, and if adapters lie beside the weights.
        """
        if any(not lora["merged"] for lora in self.loras):
            raise ValueError("adapters beside the weights would not be saved: load them with merge=True, or unload_lora()")
        parts = PipelineParts(
            transformer=self.transformer,
            autoencoder=self.autoencoder,
            text_encoder=self.text_encoder,
            flow_shift=self.flow_shift,
            controlnet=self.controlnet,
        )
        save_parts(parts, path, layout=layout)

    def load_lora(self, path: str | Path, *, scale: float = 1.0, merge: bool = False) -> None:
        """Draw with an adapter (LoRA, LoHa, LoKr) from now on; adapters that are loaded already keep their effect.

        Args:
            path: of a file or folder, see `files.lora.read_lora`.
            scale: how strongly it acts; 1: as it was trained, 0: not at all, below 0: the other way.
            merge: add it to the weights, for good: costs no time in drawing, but weights of 16 bits round small changes away.
                Otherwise it is computed beside them, and `unload_lora` takes it away.

        Warns of tensors in the file that fit nothing. Raises as `files.lora.read_lora`.
        """
        scale, adapter = real_number("scale", scale), read_lora(path, self.transformer)
        (merge_changes if merge else attach_changes)(self.transformer, adapter.changes, scale)
        if merge and self.offload is not None:
            self.offload.renew(self.transformer)
        self.loras.append({"path": str(path), "scale": scale, "merged": merge})
        if (unread := adapter.describe_unread()) is not None:
            warnings.warn(f"{path}: {unread}", stacklevel=2)

    def unload_lora(self) -> None:
        """Take away all adapters that are not merged."""
        detach_changes(self.transformer)
        self.loras = [lora for lora in self.loras if lora["merged"]]

    @property
    def device(self) -> torch.device:
        return self.transformer.head.weight.device if self.offload is None else self.offload.device

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        if self.offload is not None:
            raise ValueError(
                f"the parts of this pipeline come to {self.device} when they work: give from_pretrained the device and dtype"
            )
        return super()._apply(*args, **kwargs)

    @torch.inference_mode()
    def forward(
        self,
        prompts: list[str],
        height: int | None = None,
        width: int | None = None,
        *,
        image: Pictures | None = None,
        strength: float | None = None,
        mask: Pictures | None = None,
        control_image: ControlPictures | None = None,
        control_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        num_steps: int | None = None,
        guidance_scale: float = 4.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | None = "",
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        solver: str | None = None,
        on_step: OnStep | None = None,
        on_estimate: OnEstimate | None = None,
    ) -> list[Image.Image]:
        """Draw images for prompts: those of the first prompt, then those of the second, and so on.

        How an image was drawn is noted in it; `save_picture` writes it into the PNG, `read_facts` reads it.

        Args:
            prompts: list of str.
            height, width: in pixels, multiples of the autoencoder's factor times the patch size; None: the picture's own size,
                to the nearest multiple, or without a picture the model's.
            image: a picture to start from (img2img), one for all prompts or one for each; scaled to cover height x width, its
                middle cut out.
            strength: how much of `image` is drawn anew. 0 returns it, 1 draws as if it were not there, and between them that
                share of the steps is done. None: 0.6, or 1 with a mask.
            mask: of the size of `image` (inpainting): only what is white is drawn anew; gray blends, black stays as it is.
            control_image: what the ControlNet sees (edges, depth, ...), one for all prompts or one for each, sized
                like `image`; or the latents of such pictures, (1 or B, C, h, w).
            control_scale: how strongly the ControlNet steers; 0: not at all.
            num_images_per_prompt: images of each prompt; image k of a prompt has the prompt's seed + k.
            num_steps: number of velocity predictions, each for the whole batch; None: 20, or 2 for Sana-Sprint.
            guidance_scale: weight of classifier-free guidance; 1 turns it off and halves the cost.
            guidance_interval: (lo, hi) in sigma; guidance acts only there (see `classifier_free_guidance`).
            negative_prompt: text to guide away from, for all images; encoded without the instruction, as published. Weights
                whose null caption is "caption_mask" see as many of its tokens as the prompt has.
            seed: of the noise. A number: of every prompt, so that an image does not depend on its batch. A sequence: one seed
                per prompt. None: new seeds every time.
            generator: draws the noise of the whole batch at once, as diffusers does; in place of `seed`.
            solver: "flow_dpm_solver" (14 to 20 steps) or "flow_euler" (28 to 50); Sana-Sprint has "scm" (1 to 4), which takes
                the guidance scale as an input, and no negative prompt. None: the model's own.
            on_step: called after each step with (index, latents), e.g. for a progress bar.
            on_estimate: called in each step with (index, latents to which it leads), for previews by `decode_pictures`.

        Warns of prompts that the text encoder cuts. Raises TypeError unless prompts are a list of str. Raises ValueError for no
        prompts, a size that is no multiple, an unknown solver, num_steps or num_images_per_prompt below 1, a guidance_scale
        that is not finite, a bad guidance_interval, a wrong number of seeds, both a seed and a generator, what should be a
        number and is none, and for pictures as `StartPictures.check` says. Raises NotFiniteError, a ValueError, if a model
        gives values that are not finite.
        """
        guidance_interval = interval("guidance_interval", guidance_interval)
        sprints = self.transformer.config.guidance_embeds
        solver, num_steps = choose_solver(solver, num_steps, negative_prompt, guidance_interval, sprints=sprints)
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} must be at least 1")
        guidance_scale = real_number("guidance_scale", guidance_scale)
        control_scale, negative_prompt = real_number("control_scale", control_scale), text("negative_prompt", negative_prompt)
        start = StartPictures.check(image, mask, strength, len(prompts))
        guide = GuidePictures.check(control_image, len(prompts), self.autoencoder, self.controlnet)
        height, width = self.image_size(height, width, start or guide)
        seeds = image_seeds(seed, generator, len(prompts), num_images_per_prompt)
        captions = self.encode_prompts(prompts, num_images_per_prompt)
        if (cut := self.describe_cut(prompts)) is not None:
            warnings.warn(cut, stacklevel=2)
        null = self.encode_null(captions, negative_prompt)
        count = len(prompts) * num_images_per_prompt
        start = start.resized(height, width) if start else None
        if start is not None and start.strength == 0:
            images = start.copies(count)
        else:
            size = (height // self.autoencoder.compression, width // self.autoencoder.compression)
            latents = draw_latents(
                self.transformer,
                captions,
                null,
                noise_source((count, self.transformer.config.in_channels, *size), seeds, generator, self.device),
                solver=solver,
                num_steps=num_steps,
                flow_shift=self.flow_shift,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                control=self._control(guide, height, width, count, control_scale) if guide else None,
                start=start.encode(self.autoencoder, count) if start else None,
                on_step=on_step,
                on_estimate=on_estimate,
            )
            images = decode_pictures(self.autoencoder, latents)
            images = start.keep(images) if start else images
        settings = {
            "height": height, "width": width, "num_steps": num_steps, "guidance_scale": guidance_scale,
            "guidance_interval": list(guidance_interval), "negative_prompt": negative_prompt, "solver": solver,
            "strength": start.strength if start else None, "control_scale": control_scale if guide else None,
        }  # fmt: skip
        self._note(images, prompts, seeds, settings)
        return images

    def _note(self, images: list[Image.Image], prompts: list[str], seeds: list[int] | None, settings: dict[str, Any]) -> None:
        """Note in each image how it was drawn; those of a prompt follow each other."""
        each = len(images) // len(prompts)
        dtype = name_dtype(self.transformer.head.weight.dtype)
        facts: dict[str, Any] = {"model": self.name, "dtype": dtype, "flow_shift": self.flow_shift}
        facts |= {"precision": precision} if (precision := precision_of(self.transformer)) != "full" else {}
        facts |= {"lora": self.loras} if self.loras else {}
        for index, image in enumerate(images):
            own = {"prompt": prompts[index // each], "seed": seeds[index] if seeds else None}
            set_facts(image, own | facts | {"settings": settings})

    def describe_cut(self, prompts: list[str]) -> str | None:
        """Say which prompts are too long for the text encoder, which cuts them; None if none is."""
        return describe_cut(prompts, self.text_encoder.count_tokens(prompts), self.text_encoder.config.max_tokens)

    def encode_prompts(self, prompts: list[str], num_each: int = 1, *, use_instruction: bool = True) -> Caption:
        """Encode prompts, each `num_each` times, behind the model's instruction text or without it. Raises NotFiniteError."""
        bring(self.text_encoder)
        encoded = self.text_encoder.encode(prompts, use_instruction=use_instruction)
        embeds, mask = (each.repeat_interleave(num_each, 0) for each in encoded)
        self._check_states(embeds)
        return embeds, mask

    def encode_null(self, captions: Caption, negative_prompt: str = "") -> Caption | None:
        """Encode what guidance leads away from; None for Sana-Sprint, which has nothing of the kind. Raises NotFiniteError."""
        if self.transformer.config.guidance_embeds:
            return None
        bring(self.text_encoder)
        null = self.text_encoder.encode_null(captions[1], self.transformer.config.null_caption, negative_prompt)
        self._check_states(null[0])
        return null

    def _check_states(self, states: Tensor) -> None:
        """Raise NotFiniteError if what the text encoder gave is not finite, in the dtype of the transformer too."""
        check_finite(states, self.text_encoder, "text encoder", dtype=self.text_encoder.dtype)
        dtype = self.transformer.head.weight.dtype
        if not bool(torch.isfinite(states.to(dtype)).all()):
            raise NotFiniteError(
                f"the text encoder gives values of up to {states.abs().max():.3g}, too large for the transformer in "
                f"{name_dtype(dtype)}: take bfloat16 or float32 for the transformer"
            )

    def _control(self, guide: GuidePictures, height: int, width: int, count: int, scale: float) -> Control:
        """The ControlNet with the latents of its pictures, for `count` images. Raises ValueError if they have another size."""
        assert self.controlnet is not None, "GuidePictures.check asks for one"
        latents = guide.encode(height, width).to(self.device)
        return Control(self.controlnet, latents.repeat_interleave(count // len(latents), 0), scale)

    def image_size(
        self, height: int | None, width: int | None, given: StartPictures | GuidePictures | None = None
    ) -> tuple[int, int]:
        """Return the size to draw at, as `forward` takes it; by default that of the `given` pictures, or the model's.

        Raises ValueError for a size that does not divide, or if the given pictures have several.
        """
        config, factor = self.transformer.config, self.autoencoder.compression
        unit = factor * config.patch_size
        if height is None or width is None:
            own = (config.base_size * unit,) * 2 if given is None else given.size
            height = nearest_multiple(own[0], unit) if height is None else height
            width = nearest_multiple(own[1], unit) if width is None else width
        return check_size(height, width, unit)
