"""The detector of GenEval: a Mask2Former of transformers, from pictures to objects with scores, boxes and masks.

The published evaluation runs mmdet's Mask2Former (Swin-S, COCO instances). Resizing, scores and boxes are computed here as
mmdet does, which differs from transformers' own post-processing: one query may give several objects, masks overlap freely, and
an object's score is its class probability times the mean probability inside its mask.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForUniversalSegmentation

from pipelines.evaluate.geneval.rules import Box, Detection
from pipelines.workers.models import pick_device, pretrained

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, of values from 0 to 255
MULTIPLE = 32  # pixels; inputs are padded to such sides
MAX_OBJECTS = 100
"""Objects per picture, those with the highest class probability."""
OTHER_NAMES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
}
"""COCO's classes that models call otherwise than GenEval's prompts do."""


class Detector:
    """A Mask2Former with its labels, named as GenEval does.

    Args:
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        short_side, long_side: pixels; a picture is scaled so that its shorter side has `short_side`, or its longer `long_side`
            if that is smaller.
        min_score: objects with a lower score are left out, and the masks of most of them are never made.

    Raises ValueError if the model is no Mask2Former.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        short_side: int = 800,
        long_side: int = 1333,
        min_score: float = 0.0,
    ):
        path, options = pretrained(model, revision)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        if config.model_type != "mask2former":
            raise ValueError(f"{model} is a {config.model_type}: GenEval's detector is a mask2former with instances")
        self.device = pick_device(device)
        loaded: Any = AutoModelForUniversalSegmentation.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=False, **options
        )
        self.model = loaded.to(self.device).eval()
        labels = config.id2label
        self.names = [OTHER_NAMES.get(labels[number], labels[number]) for number in range(len(labels))]
        self.short_side, self.long_side, self.min_score = short_side, long_side, min_score

    def prepare(self, image: Image.Image) -> Tensor:
        """Scale and normalize an RGB picture: (3, H, W), each side a multiple of 32; may be called from several threads."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        height, width = self.scaled_size(image.height, image.width)
        scaled = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0].round()
        normal = (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return F.pad(normal, (0, -width % MULTIPLE, 0, -height % MULTIPLE))

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of a picture's input, before it is padded."""
        short, long = sorted((height, width))
        scale = min(self.long_side / long, self.short_side / short)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    @torch.inference_mode()
    def detect(self, prepared: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[list[Detection]]:
        """The objects in each picture: one forward pass for all pictures whose inputs have the same size.

        Args:
            prepared: what `prepare` makes of each picture.
            sizes: (height, width) of each picture itself; boxes and masks are in its pixels.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, pixels in enumerate(prepared):
            groups[tuple(pixels.shape)].append(index)
        found: dict[int, list[Detection]] = {}
        for indices in groups.values():
            pixels = torch.stack([prepared[index] for index in indices]).to(self.device, self.model.dtype)
            output = self.model(pixel_values=pixels)
            for place, index in enumerate(indices):
                classes, masks = output.class_queries_logits[place].float(), output.masks_queries_logits[place].float()
                found[index] = self._objects(classes, masks, tuple(pixels.shape[-2:]), sizes[index])
        return [found[index] for index in range(len(prepared))]

    def _objects(
        self, class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, ...], size: tuple[int, int]
    ) -> list[Detection]:
        """The objects of one picture. Logits are (queries, classes + 1) and (queries, h, w)."""
        probabilities = class_logits.softmax(-1)[:, :-1]
        best = probabilities.flatten().topk(min(MAX_OBJECTS, probabilities.numel()))
        sure = best.indices[best.values > self.min_score]  # an object's score is at most its class probability
        if not len(sure):
            return []
        queries, labels = sure // probabilities.shape[1], sure % probabilities.shape[1]
        used, places = queries.unique(return_inverse=True)
        logits = _to_picture(mask_logits[used], padded, self.scaled_size(*size), size)
        masks = logits > 0
        inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
        scores = probabilities.flatten()[sure] * inside[places]
        shown = masks.cpu().numpy()
        boxes = [_box(mask) for mask in shown]
        return [
            Detection(self.names[label], score, boxes[place], shown[place])
            for label, score, place in zip(labels.tolist(), scores.tolist(), places.tolist(), strict=True)
            if score > self.min_score
        ]


def _to_picture(logits: Tensor, padded: tuple[int, ...], scaled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mask logits (N, h, w) to the picture's own pixels: to the padded input, without the padding, then to the picture."""
    whole = F.interpolate(logits[None], padded, mode="bilinear", align_corners=False)[..., : scaled[0], : scaled[1]]
    return F.interpolate(whole, size, mode="bilinear", align_corners=False)[0]


def _box(mask: np.ndarray) -> Box:
    """The box around a mask, its right and bottom just outside; zeros for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return (0.0, 0.0, 0.0, 0.0)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
