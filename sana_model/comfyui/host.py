"""What the nodes ask of ComfyUI while they work: room on its device, its progress bar with previews, and whether to stop.

ComfyUI's own modules exist only in its process, so the functions here import them when they are called.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def device() -> torch.device:
    """Where ComfyUI computes."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def offload_device() -> torch.device:
    """Where ComfyUI keeps the models that it has taken off its device."""
    import comfy.model_management

    return comfy.model_management.unet_offload_device()


class Movable:
    """Modules that ComfyUI moves to its device and back, together with those of its own nodes."""

    def __init__(self, *modules: nn.Module):
        from comfy.model_patcher import ModelPatcher

        self.patcher: Any = ModelPatcher(nn.ModuleList(modules), load_device=device(), offload_device=offload_device())


def load(*movables: Movable | None) -> None:
    """Bring modules to ComfyUI's device, whole; it may take others away for them. None: a pipeline's own plan moves them."""
    import comfy.model_management

    patchers = [movable.patcher for movable in movables if movable is not None]
    if patchers:
        comfy.model_management.load_models_gpu(patchers, force_full_load=True)


def make_room() -> None:
    """Take all of ComfyUI's models off its device, for a pipeline that moves its own parts: ComfyUI knows nothing of those."""
    import comfy.model_management

    comfy.model_management.unload_all_models()


def bring_part(movable: Movable | None) -> None:
    """Bring one part of a pipeline to ComfyUI's device. None: the pipeline's own plan does that, so only make room for it."""
    if movable is None:
        make_room()
    else:
        load(movable)


class StepProgress:
    """Called with each prediction's index and x_0 (B, C, h, w), scaled latents: shows the progress and a preview.

    Previews are drawn as the user has chosen in ComfyUI (`--preview-method`). Raises ComfyUI's InterruptProcessingException
    when the user has cancelled.

    Args:
        colors: of `fit_colors`, for the autoencoder that decodes the latents.
    """

    def __init__(self, num_steps: int, device: torch.device, colors: tuple[Tensor, Tensor]):
        import comfy.utils
        import latent_preview

        factors, bias = colors
        latent_format = SimpleNamespace(
            latent_channels=len(factors),
            latent_rgb_factors=factors.tolist(),
            latent_rgb_factors_bias=bias.tolist(),
            latent_rgb_factors_reshape=None,
            taesd_decoder_name=None,
        )
        self.previewer = latent_preview.get_previewer(device, latent_format)
        self.num_steps = num_steps
        self.bar = comfy.utils.ProgressBar(num_steps)

    def __call__(self, index: int, x0: Tensor) -> None:
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = self.previewer.decode_latent_to_preview_image("JPEG", x0) if self.previewer else None
        self.bar.update_absolute(index + 1, self.num_steps, preview)
