"""The score stage's actor: CLIP scores against transformers' own, and which captions compete."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from pipelines.schema import CAPTIONS, IMAGES, IMAGES_PATH
from pipelines.score import CaptionScorer, ScorerConfig, read_candidates
from pipelines.shapes import draw_row, hard_negatives, phrasings, write_caption
from pipelines.tables import Table
from sana_model.checkpoint_files import resolve

CONFIG = ScorerConfig(name="clip", model="zoo://clip", captioners=("a", "b"), batch_size=3)
FIRST = 10_000_600


def image_of(row: int) -> Image.Image:
    return Image.fromarray(draw_row(row)[1])


def png(row: int) -> bytes:
    buffer = BytesIO()
    image_of(row).save(buffer, "PNG")
    return buffer.getvalue()


def table_of(captions: list[list[str]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "id": f"id{number}",
                "image_bytes": png(FIRST + number),
                "source_uri": "x",
                "candidates": [{"captioner": f"c{index}", "caption": caption} for index, caption in enumerate(texts)],
            }
            for number, texts in enumerate(captions)
        ]
    )


@pytest.fixture(scope="module")
def scorer() -> CaptionScorer:
    return CaptionScorer(CONFIG)


def test_scores_are_a_hundred_cosines_as_transformers_computes_them(scorer: CaptionScorer) -> None:
    texts = ["a red circle", "a large blue solid square in the center of a white background"]
    rows, rejects, _ = scorer.process(table_of([texts] * 4))
    assert rejects == [] and len(rows) == 4
    folder = str(resolve("zoo://clip"))
    model, processor = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=[image_of(FIRST + number) for number in range(4)], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp() * 100
    found = torch.tensor([[caption["clip_score"] for caption in row["captions"]] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_right_caption_beats_a_wrong_one(scorer: CaptionScorer) -> None:
    captions, rng = [], np.random.default_rng(0)
    for number in range(40):
        scene, _ = draw_row(FIRST + number)
        wrong = hard_negatives(scene, rng, 1)[0]
        captions.append([write_caption(scene, phrasings(scene)[0]), write_caption(wrong, phrasings(scene)[0])])
    rows, _, _ = scorer.process(table_of(captions))
    right = [row["captions"][0]["clip_score"] > row["captions"][1]["clip_score"] for row in rows]
    assert sum(right) >= 36


def test_long_captions_are_cut_and_missing_ones_refused(scorer: CaptionScorer) -> None:
    long = "a red circle " * 400
    rows, rejects, _ = scorer.process(table_of([[long, long + "and more"], []]))
    scores = [caption["clip_score"] for caption in rows[0]["captions"]]
    assert scores[0] == scores[1]  # 77 tokens are seen of either
    assert rows[0]["captions"][0]["caption"] == long
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id1", "no_caption")]


def test_every_caption_of_an_image_competes_and_the_original_too(tmp_path: Path) -> None:
    images = Table(str(tmp_path), IMAGES_PATH, IMAGES)
    base = {"format": "PNG", "width": 64, "height": 64, "phash": "0" * 16, "metadata": None, "source_uri": "x"}
    rows = [{"id": name, "image_bytes": b"", "caption": caption, **base} for name, caption in (("x", "given"), ("y", None))]
    images.write_shard("00000", pa.Table.from_pylist(rows, IMAGES))
    tables = {}
    for captioner, captioned in (("a", ["x", "y"]), ("b", ["y"])):
        tables[captioner] = Table(str(tmp_path), f"captions/{captioner}", CAPTIONS)
        told = [
            {"id": name, "caption": f"{captioner} of {name}", "num_tokens": 3, "finish_reason": "stop"} for name in captioned
        ]
        tables[captioner].write_shard("00000", pa.Table.from_pylist(told, CAPTIONS))
    found = {row["id"]: row["candidates"] for row in read_candidates(images, tables, "00000").to_pylist()}
    assert found == {
        "x": [{"captioner": "original", "caption": "given"}, {"captioner": "a", "caption": "a of x"}],
        "y": [{"captioner": "a", "caption": "a of y"}, {"captioner": "b", "caption": "b of y"}],
    }
