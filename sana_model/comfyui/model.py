"""What travels between the nodes: a loaded model with its adapters, a ControlNet, and an encoded prompt."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from PIL import Image
from torch import Tensor

from sana_model.comfyui.host import Movable
from sana_model.guidance import Caption
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.lora import WeightChange, attach_changes, detach_changes
from sana_model.pipeline import TextToImage
from sana_model.previews import fit_colors

MODEL, CONDITIONING, CONTROLNET = "SANA_MODEL", "SANA_CONDITIONING", "SANA_CONTROL_NET"
"""Names of the types of the nodes' wires, besides ComfyUI's own IMAGE, MASK and LATENT."""


class Loaded:
    """A pipeline in memory. ComfyUI moves its parts one by one, unless the pipeline's memory mode does."""

    def __init__(self, pipeline: TextToImage):
        self.pipeline = pipeline
        drawing = [module for module in (pipeline.transformer, pipeline.controlnet) if module is not None]
        moves_itself = pipeline.offload is not None
        self.text_encoder = None if moves_itself else Movable(pipeline.text_encoder)
        self.transformer = None if moves_itself else Movable(*drawing)
        self.autoencoder = None if moves_itself else Movable(pipeline.autoencoder)

    @cached_property
    def colors(self) -> tuple[Tensor, Tensor]:
        """Of previews, see `fit_colors`; the autoencoder may be anywhere."""
        return fit_colors(self.pipeline.autoencoder)

    @property
    def latent_scale(self) -> float:
        """The model's latents are those of ComfyUI, which are as the autoencoder gives them, times this."""
        return self.pipeline.autoencoder.config.scaling_factor


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, and the adapters that one wants beside its weights. Other nodes may want others."""

    loaded: Loaded
    adapters: tuple[tuple[Mapping[str, WeightChange], float], ...] = ()

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """The transformer has the adapters in here, and nowhere else."""
        transformer = self.loaded.pipeline.transformer
        try:
            for changes, scale in self.adapters:
                attach_changes(transformer, changes, scale)
            yield
        finally:
            detach_changes(transformer)


class LoadedControlNet:
    """A ControlNet of its own file, which ComfyUI moves."""

    def __init__(self, controlnet: SanaControlNet):
        self.controlnet = controlnet
        self.movable = Movable(controlnet)


@dataclass(frozen=True)
class ControlPictures:
    """What steers a drawing. `controlnet`: None is the model's own."""

    controlnet: LoadedControlNet | None
    images: list[Image.Image]
    scale: float


@dataclass(frozen=True)
class Conditioning:
    """An encoded prompt.

    captions: one caption. null: what guidance leads away from; None for Sana-Sprint. negative: the text of `null`.
    """

    captions: Caption
    null: Caption | None
    negative: str
    control: ControlPictures | None = None
