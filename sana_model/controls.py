"""Control pictures: what a ControlNet is to see of a picture. Edges, depth, outlines, scribbles.

A detector turns an RGB picture into an RGB control picture of the same size.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForDepthEstimation, AutoProcessor

from sana_model.files.opencv import import_cv2
from sana_model.files.places import resolve
from sana_model.files.tensors import read_weights_file
from sana_model.nn.hed import HedNetwork
from sana_model.zoo.published import HED_WEIGHTS

Detector = Callable[[Image.Image], Image.Image]


class CannyDetector:
    """White edges on black, by OpenCV's Canny. Raises ImportError, which says what to install, without OpenCV.

    Args:
        low, high: thresholds of the gradient, from 0 to 255: above `high` a pixel is an edge, above `low` if it continues one.
    """

    def __init__(self, low: int = 100, high: int = 200):
        self.low, self.high, self.cv2 = low, high, import_cv2()

    def __call__(self, image: Image.Image) -> Image.Image:
        return _to_rgb(self.cv2.Canny(np.asarray(image.convert("RGB")), self.low, self.high))


class DepthDetector:
    """Depth by any model for depth estimation of transformers: white is what is nearest in the picture, black the farthest.

    Args:
        model: a local folder, a hub id, or an hf:// or fsspec URI.
        revision: of a hub id.
        gives_distance: whether large values of the model are far away (models of metric depth), and not near.

    Raises OSError (of transformers) or FileNotFoundError if there is no such model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        gives_distance: bool = False,
        device: torch.device | str = "cpu",
    ):
        place = resolve(model) if "://" in str(model) else model
        pinned = {"revision": revision} if revision else {}
        self.processor = AutoProcessor.from_pretrained(place, trust_remote_code=False, **pinned)
        self.model = AutoModelForDepthEstimation.from_pretrained(place, trust_remote_code=False, **pinned).to(device).eval()
        self.gives_distance, self.device = gives_distance, torch.device(device)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Image.Image:
        inputs = self.processor(images=[image.convert("RGB")], return_tensors="pt").to(self.device)
        output = self.model(**inputs)
        size = [(image.height, image.width)]
        depth = self.processor.post_process_depth_estimation(output, target_sizes=size)[0]["predicted_depth"].float()
        near = -depth if self.gives_distance else depth
        span = near.max() - near.min()
        share = (near - near.min()) / span if span > 0 else torch.zeros_like(near)
        return _to_rgb((share * 255).round().byte().cpu().numpy())


class OutlineDetector:
    """Outlines that HED finds, as soft gray lines, or as scribbles: white lines of one width on black.

    Args:
        weights: path or URI of `ControlNetHED.pth`.
        thickness: None: soft lines. A number: scribbles of about that many pixels, as NVlabs draws them for its ControlNets (in
            training 0 to 24 at random, in drawing 2). Needs OpenCV.

    Raises FileNotFoundError if there are no such weights, ValueError if they are others, ImportError without OpenCV.
    """

    def __init__(self, weights: str | Path = HED_WEIGHTS, *, thickness: int | None = None, device: torch.device | str = "cpu"):
        if thickness is not None and thickness < 0:
            raise ValueError(f"thickness={thickness} must be 0 or more pixels, or None for soft lines")
        self.thickness, self.device = thickness, torch.device(device)
        if thickness is not None:
            import_cv2()  # whoever lacks it is told before the first picture
        self.model = HedNetwork()
        try:
            self.model.load_state_dict(read_weights_file(resolve(weights)))
        except RuntimeError as error:
            raise ValueError(f"{weights} holds no weights of HED: {error}") from error
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float().to(self.device)
        lines = (self.model(pixels)[0, 0] * 255).byte().cpu().numpy()
        return _to_rgb(lines if self.thickness is None else _scribble(lines, self.thickness))


def _scribble(lines: np.ndarray, thickness: int) -> np.ndarray:
    """Keep the crests of soft lines (H, W), and draw them in one width: NVlabs, tools/controlnet/utils.py."""
    cv2 = import_cv2()
    blurred = cv2.GaussianBlur(lines.astype(np.float32), (0, 0), 3.0)
    crests = np.zeros_like(lines)
    for direction in ((0, 1), (1, 0), (1, 1), (1, -1)):
        kernel = np.zeros((3, 3), np.uint8)
        for step in (-1, 0, 1):
            kernel[1 + step * direction[0], 1 + step * direction[1]] = 1
        crests[(cv2.dilate(blurred, kernel) == blurred) & (blurred > 127)] = 255
    drawn = np.where(cv2.GaussianBlur(crests, (0, 0), 3.0) > 4, 255, 0).astype(np.uint8)
    if thickness == 0:
        return cv2.erode(drawn, np.ones((4, 4), np.uint8))
    return cv2.dilate(drawn, np.ones((thickness // 2,) * 2, np.uint8)) if thickness > 1 else drawn


def _to_rgb(gray: np.ndarray) -> Image.Image:
    """(H, W) uint8 to an RGB image."""
    return Image.fromarray(gray).convert("RGB")
