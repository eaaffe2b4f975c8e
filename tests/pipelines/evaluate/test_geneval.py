"""GenEval's detector, its colors, and the whole chain on drawn scenes whose truth is known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from pipelines.evaluate.geneval.colors import cut_out
from pipelines.evaluate.geneval.config import GenEvalConfig
from pipelines.evaluate.geneval.detector import MAX_OBJECTS, Detector
from pipelines.evaluate.geneval.metric import GenEval
from pipelines.evaluate.geneval.rules import Detection
from pipelines.evaluate.run import MetricWorker
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.scenes import COLORS, RELATIONS, SHAPES, Scene, ShapesConfig
from pipelines.tables.schema import Row
from pipelines.workers.images import to_png
from tests.support.metric_models import GENEVAL_LABELS, write_detector


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_detector(tmp_path_factory.mktemp("mask2former"))


def picture(number: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(draw_row(number)[1]).resize(size)


def reference(folder: str, image: Image.Image, short_side: int) -> list[Detection]:
    """The objects in a picture as mmdet finds them: every pair of query and class, one after the other."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    scale = short_side / min(image.size)
    height, width = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
    pixels = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float(), (height, width), mode="bilinear", align_corners=False
    ).round()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    padded = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    padded[..., :height, :width] = pixels
    with torch.no_grad():
        output = model(pixel_values=padded)
    found = []
    for query in range(output.class_queries_logits.shape[1]):
        mask = output.masks_queries_logits[:, query : query + 1]
        mask = torch.nn.functional.interpolate(mask, padded.shape[-2:], mode="bilinear")[..., :height, :width]
        mask = torch.nn.functional.interpolate(mask, image.size[::-1], mode="bilinear")[0, 0]
        inside = mask > 0
        certainty = mask.sigmoid()[inside].sum() / (inside.sum() + 1e-6)
        y, x = np.nonzero(inside.numpy())
        box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)) if len(x) else (0.0,) * 4
        for label, share in enumerate(output.class_queries_logits[0, query].softmax(-1)[:-1]):
            name = "potted plant" if GENEVAL_LABELS[label] == "pottedplant" else GENEVAL_LABELS[label]
            found.append(Detection(name, float(share * certainty), box, inside.numpy()))  # type: ignore[arg-type]
    return sorted(found, key=lambda one: -one.score)


def test_objects_are_those_that_mmdet_would_find(detector_folder: str) -> None:
    images = [picture(0), picture(1, (64, 40)), picture(2), picture(3, (37, 64))]
    detector = Detector(detector_folder, short_side=96)
    prepared = [detector.prepare(image) for image in images]
    assert [tuple(pixels.shape) for pixels in prepared] == [(3, 96, 96), (3, 96, 160), (3, 96, 96), (3, 192, 96)]
    sizes = [(image.height, image.width) for image in images]
    together = detector.detect(prepared, sizes)
    for image, found in zip(images, together, strict=True):
        expected = reference(detector_folder, image, 96)
        found.sort(key=lambda one: -one.score)
        assert len(found) == min(len(expected), MAX_OBJECTS) == 7 * len(GENEVAL_LABELS)
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], rel=1e-4)
        for one, other in zip(found[:5], expected[:5], strict=True):
            assert (one.name, one.box) == (other.name, other.box)
            assert one.mask is not None and other.mask is not None and (one.mask == other.mask).mean() > 0.999
    sure = Detector(detector_folder, short_side=96, min_score=0.2).detect(prepared, sizes)
    for all_found, found in zip(together, sure, strict=True):
        expected_names = [(one.name, one.box) for one in all_found if one.score > 0.2]
        assert sorted((one.name, one.box) for one in found) == sorted(expected_names)
    assert any(sure)


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zoo://clip is a clip: GenEval's detector is a mask2former"):
        Detector("zoo://clip")


def test_an_object_is_cut_out_on_gray() -> None:
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:6] = True
    mask[2, 3] = False
    cut = np.asarray(cut_out(Image.fromarray(pixels), Detection("cat", 1.0, (3, 2, 6, 4), mask)))
    assert cut.shape == (2, 3, 3) and (cut[0, 0] == 0x99).all() and (cut[1] == pixels[3, 3:6]).all()
    whole = np.asarray(cut_out(Image.fromarray(pixels), Detection("cat", 1.0, (3, 2, 6, 4), mask), None))
    assert (whole == pixels[2:4, 3:6]).all()
    assert cut_out(Image.fromarray(pixels), Detection("cat", 1.0, (0, 0, 0, 0))).size == (1, 1)


def rows_of(prompts: Sequence[str], metadata: Sequence[Row | None]) -> pa.Table:
    rows = [
        {
            "id": f"{number}",
            "prompt": prompt,
            "image_bytes": to_png(picture(number)),
            "metadata": json.dumps(own) if own else None,
        }
        for number, (prompt, own) in enumerate(zip(prompts, metadata, strict=True))
    ]
    return pa.Table.from_pylist(rows)


def test_every_picture_gets_a_verdict_or_a_reason(detector_folder: str) -> None:
    config = GenEvalConfig(model=detector_folder, clip="zoo://clip", short_side=64, batch_size=3, colors=tuple(COLORS))
    unknown = {"tag": "single_object", "include": [{"class": "zebra", "count": 1}]}
    mauve = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "mauve"}]}
    broken = {"tag": "single_object", "include": [{"count": 1}]}
    prompts = ["a photo of a star", "a photo of two potted plants", "a red star", "b", "c", "d", "a photo of a cyan star"]
    made = MetricWorker("geneval", config).process(rows_of(prompts, [None, None, None, unknown, mauve, broken, None]))
    assert [(row["id"], row["task"]) for row in made.rows] == [("0", "single_object"), ("1", "counting"), ("6", "colors")]
    assert [row["reject_reason"] for row in made.rejects] == ["no_request", "unknown_class", "unknown_color", "bad_metadata"]
    for row in made.rows:
        assert row["correct"] is not bool(row["faults"])
        assert all(0.3 < one["score"] <= 1 and len(one["box"]) == 4 for one in row["objects"])
    found, versions = GenEval.find_models(config)
    assert found == config and set(versions) == {"model", "clip"}


class ExactDetector:
    """Finds the objects of drawn scenes by their truth: pixels that are not background, one half for each of two."""

    names = SHAPES

    def __init__(self, scenes: dict[bytes, Scene]):
        self.scenes = scenes

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def detect(self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> list[list[Detection]]:
        return [self._find(np.asarray(image).astype(int), self.scenes[image.tobytes()]) for image in images]

    def _find(self, pixels: np.ndarray, scene: Scene) -> list[Detection]:
        shown = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        first = np.ones_like(shown)
        if scene.relation is not None:
            half = pixels.shape[0] // 2
            (first.T if scene.relation == "left of" else first)[half:] = False
        masks = [shown & first, shown & ~first]
        found = []
        for thing, mask in zip(scene.things, masks, strict=False):
            y, x = np.nonzero(mask)
            box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
            found.append(Detection(thing.shape, 0.95, box, mask))
        return found


def asked_of(scene: Scene, other: Scene) -> list[tuple[Row, bool]]:
    """Requests about a scene, as metadata, and whether it shows them: its own truth, and that of another scene."""
    requests: list[tuple[Row, bool]] = []
    names = [thing.shape for thing in scene.things]
    if len(set(names)) < len(names):  # whose colors are asked for would be a matter of chance
        count = len(names)
        for asked in (1, 2):
            include, exclude = {"class": names[0], "count": asked}, {"class": names[0], "count": asked + 1}
            requests.append(({"tag": "counting", "include": [include], "exclude": [exclude]}, asked == count))
        return requests
    for source in (scene, other):
        include = [{"class": own.shape, "count": 1, "color": own.color} for own in source.things]
        right = all(any((own.shape, own.color) == (t.shape, t.color) for t in scene.things) for own in source.things)
        requests.append(({"tag": "colors" if len(include) == 1 else "color_attr", "include": include}, right))
    if scene.relation is not None:
        for relation in (scene.relation, RELATIONS[scene.relation]):
            target, placed = {"class": names[1], "count": 1}, {"class": names[0], "count": 1, "position": [relation, 0]}
            requests.append(({"tag": "position", "include": [target, placed]}, relation == scene.relation))
    return requests


def test_the_whole_chain_agrees_with_the_truth_of_drawn_scenes(detector_folder: str) -> None:
    config = ShapesConfig(pair_share=0.6)
    drawn = [draw_row(10_004_000 + number, config) for number in range(60)]
    scenes = {Image.fromarray(pixels).tobytes(): scene for scene, pixels in drawn}
    asked = [
        (request, right, pixels)
        for (scene, pixels), (other, _) in zip(drawn, [*drawn[1:], drawn[0]], strict=True)
        for request, right in asked_of(scene, other)
    ]
    rows = [
        {"id": f"{number}", "prompt": "", "image_bytes": to_png(Image.fromarray(pixels)), "metadata": json.dumps(request)}
        for number, (request, _, pixels) in enumerate(asked)
    ]
    worker = MetricWorker(
        "geneval",
        GenEvalConfig(
            model=detector_folder, clip="zoo://clip", colors=tuple(COLORS), color_templates=("a {color} {name}",), batch_size=32
        ),
    )
    metric: Any = worker.metric
    metric.detector = ExactDetector(scenes)
    made = worker.process(pa.Table.from_pylist(rows))
    assert made.rejects == [] and len(made.rows) == len(asked) > 150
    agreed: dict[str, list[bool]] = {}
    for row, (request, right, _) in zip(made.rows, asked, strict=True):
        agreed.setdefault(request["tag"], []).append(row["correct"] is right)
    shares = {task: f"{np.mean(own):.3f} of {len(own)}" for task, own in sorted(agreed.items())}
    print(f"verdicts that agree with the truth: {shares}")
    assert np.mean(agreed["position"]) == np.mean(agreed["counting"]) == 1.0  # boxes are exact, so the rules must be right
    assert np.mean(agreed["colors"]) >= 0.9 and np.mean(agreed["color_attr"]) >= 0.9  # by the tiny CLIP
