"""Scorers of images alone, with tiny real models that are made here."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipelines.audit.verify import verify_dataset
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.reports.image_scores import image_scores_report
from pipelines.score.config import ImageScorerConfig
from pipelines.score.embeds import embeds_table, to_vectors
from pipelines.score.heads import EmbeddingScorer, Head
from pipelines.score.images import ImageScorer, run_image_scores
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES, image_embeds_path, image_embeds_schema, image_scores_path
from pipelines.tables.table import Table
from pipelines.workers.images import decode
from tests.support.hostile_images import encode, gradient
from tests.support.html_page import check_page

SIZE = {"height": 32, "width": 32}
CONTENTS = [encode(gradient(40, 50 + number, blue=20 * number), "PNG") for number in range(7)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    nn.init.normal_(model.classifier.weight)  # as it begins, it would say the same of every image
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    ViTImageProcessorPil(size=SIZE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A head as LAION keeps it: a pickle of a Sequential named `layers`, with dropout between."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    file = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, file)
    return str(file)


def table_of(contents: list[bytes]) -> pa.Table:
    return pa.table(
        {"id": [f"id{i}" for i in range(len(contents))], "image_bytes": contents, "source_uri": ["x"] * len(contents)}
    )


def test_a_label_is_named_or_numbered(classifier: str) -> None:
    config = ImageScorerConfig(name="nsfw", model=classifier, label="nsfw", batch_size=3)
    rows, rejects, _ = ImageScorer(config).process(table_of([*CONTENTS, b"no image"]))
    model, processor = ViTForImageClassification.from_pretrained(classifier), ViTImageProcessorPil.from_pretrained(classifier)
    pixels = processor(images=[decode(content) for content in CONTENTS], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.softmax(-1)[:, 1]
    scores = [row["score"] for row in rows]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(set(scores)) == len(CONTENTS)
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id7", "not_an_image")]
    other = ImageScorer(ImageScorerConfig(name="normal", model=classifier, label="0")).process(table_of(CONTENTS))
    np.testing.assert_allclose([row["score"] for row in other.rows], 1 - expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"no label 'watermark'; it has normal, nsfw"):
        ImageScorer(ImageScorerConfig(name="x", model=classifier, label="watermark"))


def test_what_does_not_fit_or_is_no_number_costs_its_row_only(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ImageScorer(ImageScorerConfig(name="nsfw", model=classifier, label="nsfw", batch_size=4))
    expected = scorer.process(table_of(CONTENTS)).rows
    poison, forward = scorer._prepare({"image_bytes": CONTENTS[5]})[0], scorer.model.model.forward

    def tight(pixel_values: torch.Tensor) -> object:
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        output = forward(pixel_values=pixel_values)
        output.logits[(pixel_values == poison).flatten(1).all(1)] = torch.nan
        return output

    monkeypatch.setattr(scorer.model.model, "forward", tight)
    rows, rejects, _ = scorer.process(table_of(CONTENTS))
    assert [row["id"] for row in rows] == [f"id{number}" for number in range(7) if number != 5]
    np.testing.assert_allclose(
        [row["score"] for row in rows], [row["score"] for row in expected if row["id"] != "id5"], atol=1e-5
    )
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id5", "bad_score")]


def write_embeds(uri: str, width: int, shards: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Write embeddings, and no images at all; return them as they are stored, made unit vectors again."""
    table = Table(uri, image_embeds_path("clip"), image_embeds_schema(width))
    table.claim(Identity("embed_images", {"width": width}, {}, {}))
    found = {}
    for shard, ids in shards.items():
        vectors = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(int(shard)))
        rows = embeds_table(ids, list(nn.functional.normalize(vectors, dim=-1)), width)
        table.write_shard(shard, rows)
        found |= dict(zip(ids, to_vectors(rows), strict=True))
    return found


def test_a_head_reads_the_embeddings_of_a_dataset_and_decodes_nothing(head: str, tmp_path: Path, local_ray: None) -> None:
    """There is not even an image in the dataset."""
    uri = str(tmp_path)
    config = ImageScorerConfig(name="aesthetic", clip="clip", head=head)
    with pytest.raises(MissingTableError, match="no table 'image_embeds/clip'"):
        run_image_scores(uri, config)
    vectors = write_embeds(uri, 12, {"00000": ["x", "y", "z"], "00001": ["v"], "00002": []})
    result = run_image_scores(uri, config)
    assert (result.num_shards, result.num_rows, result.num_rejects) == (3, 4, 0)
    table = Table(uri, image_scores_path("aesthetic"), IMAGE_SCORES)
    found = {row["id"]: row["score"] for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()}
    weights = torch.load(head, weights_only=True)
    for row_id, vector in vectors.items():
        hidden = vector
        for number in (0, 2, 4):
            hidden = hidden @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
        assert found[row_id] == pytest.approx(float(hidden), abs=1e-5)
    assert len(set(found.values())) == 4 and list(table.require().inputs) == ["image_embeds/clip"]
    assert run_image_scores(uri, config).was_done and list(verify_dataset(uri, paths=[table.path])) == []


def test_a_head_of_another_width_or_no_head_is_refused_before_anything_is_made(head: str, tmp_path: Path) -> None:
    write_embeds(str(tmp_path), 16, {"00000": ["x"]})
    with pytest.raises(ValueError, match=r"head.pth takes embeddings of 12 numbers, .*/image_embeds/clip holds 16"):
        run_image_scores(str(tmp_path), ImageScorerConfig(name="aesthetic", clip="clip", head=head))
    torch.save({"other.weight": torch.zeros(1, 12)}, tmp_path / "no_head.pth")
    with pytest.raises(ValueError, match=r"no_head.pth is no head: .*holds other.weight"):
        run_image_scores(str(tmp_path), ImageScorerConfig(name="x", clip="clip", head=str(tmp_path / "no_head.pth")))
    torch.save({"layers.0.weight": torch.zeros(1, 16)}, tmp_path / "no_bias.pth")
    with pytest.raises(ValueError, match=r"no_bias.pth is no head: it needs .* layers.<n>.bias"):
        run_image_scores(str(tmp_path), ImageScorerConfig(name="x", clip="clip", head=str(tmp_path / "no_bias.pth")))
    assert not (tmp_path / "image_scores").exists()


def test_a_score_of_a_head_that_is_no_number_costs_its_row_only(head: str) -> None:
    vectors = [torch.eye(12)[0], torch.full((12,), torch.nan)]
    rows, rejects, _ = EmbeddingScorer(Head.read(head)).process(embeds_table(["x", "y"], vectors, 12))
    assert [row["id"] for row in rows] == ["x"]
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("y", "bad_score")]


def test_stage_and_page(classifier: str, tmp_path: Path, local_ray: None, without_ray: None) -> None:
    (tmp_path / "photos").mkdir()
    for number, content in enumerate(CONTENTS):
        (tmp_path / f"photos/{number}.png").write_bytes(content)
    dataset = str(tmp_path / "dataset")
    run_ingest(dataset, IngestConfig(source=str(tmp_path / "photos"), rows_per_shard=4))
    config = ImageScorerConfig(name="nsfw", model=classifier, label="nsfw")
    result = run_image_scores(dataset, config)
    assert (result.num_shards, result.num_rows, result.num_rejects) == (2, len(CONTENTS), 0)
    assert run_image_scores(dataset, config).was_done
    with pytest.raises(StaleTableError, match=r"config\.label: 'nsfw' -> 'normal'"):
        run_image_scores(dataset, ImageScorerConfig(name="nsfw", model=classifier, label="normal"))
    table = Table(dataset, image_scores_path("nsfw"), IMAGE_SCORES)
    scores = sorted(score for shard in table.list_shards() for score in table.read_shard(shard)["score"].to_pylist())
    page = image_scores_report(dataset, "nsfw")
    check_page(page)
    assert page.index(f"{scores[-1]:.3f}") < page.index(f"{scores[0]:.3f}")


@pytest.mark.parametrize(
    "fields",
    [{}, {"model": "m"}, {"clip": "c"}, {"model": "m", "head": "x.pth"}, {"model": "m", "label": "nsfw", "head": "x.pth"}],
)
def test_either_a_classifier_or_a_head(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"give model and label \(a classifier\), or clip and head"):
        ImageScorerConfig(name="x", **fields)  # type: ignore[arg-type]


def test_the_name_of_near_duplicates_is_taken() -> None:
    with pytest.raises(ValueError, match="taken by the stage"):
        ImageScorerConfig(name="near_duplicates", model="y", label="z")
