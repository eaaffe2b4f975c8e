"""Perceptual distances of two images: LPIPS, or the features of any vision model of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top-level name wants torchvision

from pipelines.train_autoencoder.config import PerceptualConfig
from pipelines.workers.models import naming, pretrained
from sana_model.files.places import resolve
from sana_model.files.tensors import read_weights_file

EPS = 1e-10
Distance = Callable[[Tensor, Tensor], Tensor]
"""(image, other), both (B, 3, H, W) in [-1, 1] -> the distance of each pair, (B,)."""


def load_perceptual(config: PerceptualConfig) -> nn.Module:
    """The frozen network as a `Distance`, in float32 on the CPU.

    Raises FileNotFoundError or ValueError if the model is not there, or is none that sees pictures.
    """
    network = Lpips(config.model) if config.kind == "lpips" else FeatureDistance(config)
    return network.eval().requires_grad_(False)


class FeatureDistance(nn.Module):
    """The mean square difference of unit features, a mean over the chosen hidden states of a vision model.

    Features of each place, a token or a pixel of a feature map, are scaled to length 1, as LPIPS does. Images are resized to
    the side that a model with learned positions was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig):
        super().__init__()
        self.name = config.model
        self.model, self.size = load_vision_model(config.model, config.revision)
        for name, values in zip(("mean", "std"), load_normalization(config.model, config.revision), strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))
        self.layers = config.layers
        with torch.no_grad():
            found = len(self.hidden_states(torch.zeros(1, 3, self.size or 64, self.size or 64)))
        if bad := [layer for layer in self.layers if not 0 <= layer < found]:
            raise ValueError(f"losses.perceptual.layers: {self.name} has no layer {bad[0]}, only 0 to {found - 1}")

    def hidden_states(self, image: Tensor) -> tuple[Tensor, ...]:
        """All hidden states of an image (B, 3, H, W) in [-1, 1]: tokens (B, N, D) or maps (B, D, h, w)."""
        if self.size is not None and image.shape[-2:] != (self.size, self.size):
            image = F.interpolate(image, (self.size, self.size), mode="bilinear", antialias=True)
        pixels = ((image + 1) / 2 - self.mean) / self.std
        return self.model(pixel_values=pixels.to(self.model.dtype), output_hidden_states=True).hidden_states

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        states = self.hidden_states(torch.cat([image, other]))
        chosen = [states[layer] for layer in self.layers] if self.layers else states
        return torch.stack([_unit_distance(state.float()) for state in chosen]).mean(0)


def _unit_distance(states: Tensor) -> Tensor:
    """The square distance of unit features, a mean over places, (B,), of states (2B, ...) of two batches of images."""
    axis = 1 if states.ndim == 4 else -1
    unit = states / (states.square().sum(axis, keepdim=True) + EPS).sqrt()
    one, other = unit.chunk(2)
    return (one - other).square().sum(axis).flatten(1).mean(1)


def load_vision_model(path: str, revision: str | None) -> tuple[Any, int | None]:
    """A vision model, or the vision tower of a model of pictures and texts, and the side of its images in pixels.

    The side is None for convolutional models, which take any. Raises as `load_perceptual`.
    """
    place, options = pretrained(path, revision)
    try:
        model = AutoModel.from_pretrained(place, trust_remote_code=False, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(f"losses.perceptual.model={path} cannot be loaded: {str(error).splitlines()[0]}") from error
    model = getattr(model, "vision_model", None) or getattr(model, "vision_tower", None) or model
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(f"losses.perceptual.model={path} is a {type(model).__name__}: it sees no pictures")
    side = getattr(model.config, "image_size", None)
    has_positions = any("position" in name for name, _ in model.named_parameters())
    return model, int(side) if isinstance(side, int) and has_positions else None


def load_normalization(path: str, revision: str | None) -> tuple[list[float], list[float]]:
    """Means and deviations of the channels, by which a vision model's images in [0, 1] are normalized.

    Raises ValueError if the model has no image processor, which tells them.
    """
    place, options = pretrained(path, revision)
    try:
        processor: Any = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"losses.perceptual.model={path} has no image processor (preprocessor_config.json), which tells how its images are "
            f"normalized: {str(error).splitlines()[0]}"
        ) from error
    if not processor.do_normalize:
        return [0.0] * 3, [1.0] * 3
    return processor.image_mean, processor.image_std


class Lpips(nn.Module):
    """LPIPS with VGG-16 (arXiv 1801.03924), by its authors' package. `weights`: torchvision's file of VGG-16."""

    def __init__(self, weights: str):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ValueError('losses.perceptual.kind=lpips needs its package: pip install "sana-on-ray[lpips]"') from error
        with naming("losses.perceptual.model"):
            file = resolve(weights)
            if Path(file).is_dir():
                raise ValueError(f"{weights} is a folder: give the file of VGG-16's weights in it")
            vgg = read_weights_file(file)
        features = {name.removeprefix("features."): value for name, value in vgg.items() if name.startswith("features.")}
        self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        state = self.network.net.state_dict()  # "slice2.5.weight" is "features.5.weight"
        theirs = {name: name.partition(".")[2] for name in state}
        if missing := next((one for one in theirs.values() if one not in features), None):
            raise ValueError(
                f"losses.perceptual.model={weights} lacks features.{missing}: give torchvision's weights of VGG-16, "
                "vgg16-397923af.pth"
            )
        self.network.net.load_state_dict({name: features[one] for name, one in theirs.items()})

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        dtype = next(self.network.net.parameters()).dtype
        return self.network(image.to(dtype), other.to(dtype)).flatten().float()
