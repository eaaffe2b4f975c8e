"""The score stage: CLIP scores from stored embeddings against transformers' own and those of one pass, and what is refused."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from pipelines.audit.verify import verify_dataset
from pipelines.score.captions import CaptionScorer, read_embedded_captions, run_score
from pipelines.score.config import ScorerConfig
from pipelines.score.embeds import embeds_table
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import full_caption, phrasings, write_caption
from pipelines.shapes.scenes import hard_negatives
from pipelines.stages.contract import Resources
from pipelines.tables.captions import captions_table
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import SCORES, Row, image_embeds_path, image_embeds_schema, scores_path
from pipelines.tables.table import Table
from sana_model.files.places import resolve
from tests.support.whole_dataset import write_table

CONFIG = ScorerConfig(
    name="clip", model="zoo://clip", captioners=("a",), batch_size=3, resources=Resources(num_cpus=0.5), max_reject_share=0.5
)
FIRST = 10_000_600


def image_of(number: int) -> Image.Image:
    return Image.fromarray(draw_row(FIRST + number)[1])


def table_of(vectors: torch.Tensor, captions: list[str]) -> pa.Table:
    """What the stage reads: a caption for each embedding."""
    ids = [f"id{number}" for number in range(len(captions))]
    return embeds_table(ids, list(vectors), vectors.shape[1]).add_column(1, "caption", pa.array(captions))


def scores_of(scorer: CaptionScorer, vectors: torch.Tensor, captions: list[str]) -> list[float]:
    rows, rejects, _ = scorer.process(table_of(vectors, captions))
    assert rejects == [] and [row["id"] for row in rows] == [f"id{number}" for number in range(len(captions))]
    return [row["clip_score"] for row in rows]


@pytest.fixture(scope="module")
def scorer() -> CaptionScorer:
    return CaptionScorer(CONFIG)


@pytest.fixture(scope="module")
def embedding(scorer: CaptionScorer) -> torch.Tensor:
    """The embedding of one image."""
    return scorer.clip.embed_images([image_of(0)])[0]


def test_scores_are_a_hundred_cosines_as_transformers_computes_them(scorer: CaptionScorer) -> None:
    texts = [full_caption(draw_row(FIRST + number)[0]) for number in range(4)]
    images = [image_of(number) for number in range(4)]
    found = scores_of(scorer, scorer.clip.embed_images(images), texts)
    folder = str(resolve("zoo://clip"))
    model, processor = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp() * 100
    torch.testing.assert_close(torch.tensor(found), expected.diagonal(), atol=0.01, rtol=0)


def test_half_precision_of_the_embeddings_moves_a_score_by_less_than_a_hundredth(scorer: CaptionScorer) -> None:
    """Against one pass over image and caption in float32. Over 2,000 images with three captions each it was 0.0041 at most."""
    scenes, images = zip(*(draw_row(FIRST + number) for number in range(48)), strict=True)
    vectors = scorer.clip.embed_images([Image.fromarray(image) for image in images])
    captions = [write_caption(scene, phrasings(scene)[number % 4]) for number, scene in enumerate(scenes)]
    in_one_pass = 100 * (vectors * scorer.clip.embed_texts(captions)).sum(-1)
    differences = np.abs(np.array(scores_of(scorer, vectors, captions)) - in_one_pass.numpy())
    assert 0 < differences.max() < 0.01


def test_the_right_caption_beats_a_wrong_one(scorer: CaptionScorer) -> None:
    right, wrong, rng = [], [], np.random.default_rng(0)
    for number in range(40):
        scene, _ = draw_row(FIRST + number)
        right.append(full_caption(scene))
        wrong.append(full_caption(hard_negatives(scene, rng, 1)[0]))
    vectors = scorer.clip.embed_images([image_of(number) for number in range(40)])
    pairs = zip(scores_of(scorer, vectors, right), scores_of(scorer, vectors, wrong), strict=True)
    assert sum(score > other for score, other in pairs) >= 36


def test_long_captions_are_cut_and_counted(scorer: CaptionScorer, embedding: torch.Tensor) -> None:
    long = "a red circle " * 400
    rows, rejects, figures = scorer.process(table_of(torch.stack([embedding] * 3), [long, long + "and more", "a red circle"]))
    assert rejects == [] and rows[0]["clip_score"] == rows[1]["clip_score"]  # 77 tokens are seen of either
    assert figures == {"captions": 3, "long_captions": 2}


def test_long_captions_in_chunks_score_the_mean_of_their_parts(scorer: CaptionScorer, embedding: torch.Tensor) -> None:
    limit = scorer.clip.max_tokens
    words = ["red", "circle", "blue", "square"] * limit
    long = " ".join(words[: 2 * limit + 20])  # one token each
    assert len(scorer.clip.tokenize([long])[0]) == 2 * limit + 20
    thirds = [" ".join(words[start:end]) for start, end in pairwise([(2 * limit + 20) * third // 3 for third in range(4)])]
    chunked = CaptionScorer(replace(CONFIG, long_captions="chunks"))
    table = table_of(torch.stack([embedding] * 5), [long, "a red circle", *thirds])
    rows, _, figures = chunked.process(table)
    scores = [row["clip_score"] for row in rows]
    assert scores[0] == pytest.approx(np.mean(scores[2:]), abs=1e-4)
    cut = [row["clip_score"] for row in scorer.process(table).rows]
    assert scores[1] == pytest.approx(cut[1], abs=1e-4) and abs(scores[0] - cut[0]) > 0.01
    assert figures == {"captions": 5, "long_captions": 1}


def test_what_has_no_embedding_and_scores_that_are_no_number_cost_their_rows_only(
    scorer: CaptionScorer, embedding: torch.Tensor
) -> None:
    broken = torch.full_like(embedding, torch.nan)
    table = table_of(torch.stack([embedding, broken, embedding, embedding]), ["a red circle"] * 4)
    table = table.set_column(2, "embedding", table["embedding"].take(pa.array([0, 1, None, 3])))
    rows, rejects, figures = scorer.process(table)
    assert [row["id"] for row in rows] == ["id0", "id3"] and figures["captions"] == 4
    assert sorted((row["id"], row["reject_reason"]) for row in rejects) == [("id1", "bad_score"), ("id2", "no_embedding")]
    refused = next(row for row in rejects if row["id"] == "id2")
    assert refused["detail"].startswith("image_embeds/clip lacks the image: the CLIP refused it")
    assert scorer.process(table.slice(0, 0)) == ([], [], {"captions": 0, "long_captions": 0})


def write_world(uri: str) -> dict[str, torch.Tensor]:
    """Two shards of three images, of which the CLIP refused one and two came with a caption; returns the embeddings.

    The images' bytes are none: nothing could be decoded.
    """
    generator = torch.Generator().manual_seed(0)
    ids = {shard: [f"{shard}-{number}" for number in range(3)] for shard in ("00000", "00001")}
    vectors = {row_id: torch.randn(128, generator=generator) for row_ids in ids.values() for row_id in row_ids}
    vectors = {row_id: vector / vector.norm() for row_id, vector in vectors.items()}
    facts = {"image_bytes": b"", "format": "PNG", "width": 1, "height": 1, "phash": "0" * 16, "source_uri": "x"}
    told = {"00000-1": "a red circle", "00001-2": "a blue square"}
    images, captions = captions_table(uri, "original"), captions_table(uri, "a")
    rows: dict[str, tuple[list[Row], list[Row]]] = {
        shard: ([{"id": row_id, "caption": told.get(row_id), **facts} for row_id in row_ids], [])
        for shard, row_ids in ids.items()
    }
    inputs = {"images": write_table(images, Identity("ingest", {}, {}, {}), rows).fingerprint}
    said = {"num_tokens": 3, "finish_reason": "stop"}
    rows = {shard: ([{"id": row_id, "caption": row_id, **said} for row_id in own], []) for shard, own in ids.items()}
    write_table(captions, Identity("caption", {}, {}, inputs), rows)
    embeds = Table(uri, image_embeds_path("clip"), image_embeds_schema(128))
    refused = reject({"id": "00001-2"}, RowRefused("truncated", ""))
    rows = {
        shard: (
            [{"id": row_id, "embedding": vectors[row_id].half().numpy()} for row_id in own if row_id != refused["id"]],
            [refused] if shard == "00001" else [],
        )
        for shard, own in ids.items()
    }
    write_table(embeds, Identity("embed_images", {"width": 128}, {}, inputs), rows)
    return vectors


def test_what_is_read_is_each_caption_with_its_images_embedding(tmp_path: Path) -> None:
    vectors = write_world(str(tmp_path))
    embeds = Table(str(tmp_path), image_embeds_path("clip"), image_embeds_schema(-1))
    table = read_embedded_captions(embeds, "a", "00001")
    assert table.column_names == ["id", "caption", "embedding"]
    assert table["caption"].to_pylist() == ["00001-0", "00001-1", "00001-2"]
    found = table["embedding"].to_pylist()
    assert found[2] is None
    np.testing.assert_allclose(found[:2], torch.stack([vectors["00001-0"], vectors["00001-1"]]), atol=1e-3)
    assert read_embedded_captions(embeds, "original", "00001")["caption"].to_pylist() == ["a blue square"]


def test_each_captioner_has_a_table_of_its_own_and_no_image_is_decoded(tmp_path: Path, without_ray: None) -> None:
    uri = str(tmp_path)
    vectors = write_world(uri)
    with pytest.raises(MissingTableError, match=r"no table 'captions/b' .* which has captions/a"):
        run_score(uri, CONFIG, "b")
    with pytest.raises(MissingTableError, match=r"no table 'image_embeds/siglip' .*\(jobs.embed_images or jobs.score\)"):
        run_score(uri, replace(CONFIG, name="siglip"), "a")
    result = run_score(uri, CONFIG, "a")
    assert (result.num_rows, result.rejects_by_reason) == (5, {"no_embedding": 1})
    table = Table(uri, scores_path("clip", "a"), SCORES)
    rows = table.read_shard("00000").to_pylist()
    clip = CaptionScorer(CONFIG).clip
    expected = [100 * float(vectors[row["id"]] @ clip.embed_texts([row["id"]])[0]) for row in rows]
    assert [row["clip_score"] for row in rows] == pytest.approx(expected, abs=0.02) and len(rows) == 3
    manifest = table.require()
    assert manifest.rows_of == "captions/a" and list(manifest.inputs) == ["image_embeds/clip", "captions/a"]

    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    result = run_score(uri, CONFIG, "original")  # a captioner joins: nothing that was there is made again
    assert (result.num_rows, result.rejects_by_reason) == (1, {"no_embedding": 1})
    assert Table(uri, scores_path("clip", "original"), SCORES).require().rows_of == "images"
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert run_score(uri, replace(CONFIG, captioners=("a", "original"), batch_size=64), "a").was_done
    with pytest.raises(StaleTableError, match=r"config\.long_captions: 'cut' -> 'chunks'"):
        run_score(uri, replace(CONFIG, long_captions="chunks"), "a")
    assert list(verify_dataset(uri, paths=["scores/clip/a", "scores/clip/original"])) == []


def test_captioners_are_named_once_each() -> None:
    with pytest.raises(ValueError, match=r"captioners=\['a', 'a'\] must differ"):
        replace(CONFIG, captioners=("a", "a"))
    with pytest.raises(ValueError, match="give tables under captions/, or 'original'"):
        replace(CONFIG, captioners=())


@pytest.mark.parametrize("name", ["", "clip/large", "_clip", "../clip"])
def test_a_clip_is_named_as_a_folder_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"name='{name}' must be a plain folder name"):
        replace(CONFIG, name=name)
