"""The score stage's actor: CLIP scores against transformers' own, and which captions compete."""

from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from pipelines.score.captions import CaptionScorer, read_candidates
from pipelines.score.config import ScorerConfig
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import hard_negatives
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH
from pipelines.tables.table import Table
from sana_model.files.places import resolve

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
    rows, rejects, figures = scorer.process(table_of([[long, long + "and more", "a red circle"], []]))
    scores = [caption["clip_score"] for caption in rows[0]["captions"]]
    assert scores[0] == scores[1]  # 77 tokens are seen of either
    assert rows[0]["captions"][0]["caption"] == long
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id1", "no_caption")]
    assert figures == {"captions": 3, "long_captions": 2}


def test_long_captions_in_chunks_score_the_mean_of_their_parts(scorer: CaptionScorer) -> None:
    limit = scorer.clip.max_tokens
    words = ["red", "circle", "blue", "square"] * limit
    long = " ".join(words[: 2 * limit + 20])  # one token each
    assert len(scorer.clip.tokenize([long])[0]) == 2 * limit + 20
    thirds = [" ".join(words[start:end]) for start, end in pairwise([(2 * limit + 20) * third // 3 for third in range(4)])]
    chunked = CaptionScorer(replace(CONFIG, long_captions="chunks"))
    rows, _, figures = chunked.process(table_of([[long, "a red circle", *thirds]]))
    scores = [caption["clip_score"] for caption in rows[0]["captions"]]
    assert scores[0] == pytest.approx(np.mean(scores[2:]), abs=1e-4)
    cut = scorer.process(table_of([[long, "a red circle"]])).rows[0]["captions"]
    assert scores[1] == pytest.approx(cut[1]["clip_score"], abs=1e-4) and abs(scores[0] - cut[0]["clip_score"]) > 0.01
    assert figures["long_captions"] == 1


def test_each_image_is_seen_once_however_many_captions_it_has(scorer: CaptionScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    embed = scorer.clip.model.get_image_features

    def counting(pixel_values: torch.Tensor) -> object:
        seen.append(len(pixel_values))
        return embed(pixel_values=pixel_values)

    monkeypatch.setattr(scorer.clip.model, "get_image_features", counting)
    scorer.process(table_of([["a", "b", "c", "d", "e"]] * 7))
    assert seen == [3, 3, 1]


def test_broken_images_and_scores_cost_their_rows_only(scorer: CaptionScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of([["a red circle"]] * 5)
    content = table["image_bytes"].to_pylist()
    content[1] = content[1][:100]
    table = table.set_column(1, "image_bytes", pa.array(content))
    embed = scorer.clip.model.get_image_features
    poison = scorer.clip.prepare_image(image_of(FIRST + 3))["pixel_values"]

    def overflowing(pixel_values: torch.Tensor) -> object:
        features = embed(pixel_values=pixel_values)
        features.pooler_output[(pixel_values == poison).flatten(1).all(1)] = torch.nan
        return features

    monkeypatch.setattr(scorer.clip.model, "get_image_features", overflowing)
    rows, rejects, _ = scorer.process(table)
    assert [row["id"] for row in rows] == ["id0", "id2", "id4"]
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id1", "truncated"), ("id3", "bad_score")]


def test_captioners_must_differ() -> None:
    for captioners in (("a", "a"), ("a", "original")):
        with pytest.raises(ValueError, match="must differ from each other and from 'original'"):
            replace(CONFIG, captioners=captioners)


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
