"""What changes a value: what each configuration counts, and that the fingerprints of datasets made before stay as they are."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest
import torch

from pipelines.caption.config import CaptionerConfig, HttpConfig, QualityConfig, VllmConfig
from pipelines.caption.imports.config import ImportConfig
from pipelines.caption.imports.run import CaptionImport
from pipelines.caption.run import run_caption
from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.sample import run_sample
from pipelines.evaluate.config import ClipScoreConfig, ShapesJudgeConfig
from pipelines.evaluate.pictures import sampled_pictures
from pipelines.evaluate.run import run_metric
from pipelines.extract.config import EmbedConfig, ExtractConfig
from pipelines.extract.embed_captions import run_embed_captions
from pipelines.extract.run import run_extract
from pipelines.ingest.config import DownloadConfig, IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.score.captions import run_score
from pipelines.score.config import DuplicatesConfig, ImageFilter, ImageScorerConfig, ScorerConfig, SemanticConfig
from pipelines.score.duplicates import run_duplicates
from pipelines.score.embeds import run_image_embeds
from pipelines.score.images import run_image_scores
from pipelines.stages.contract import Resources
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import CAPTIONS, IMAGE_SCORES, IMAGES, LATENTS, SAMPLES, SCORES, image_embeds_schema
from pipelines.tables.table import Table
from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import LoraConfig
from pipelines.train.run import train_identity
from pipelines.train.stream.config import StreamConfig

TABLES: dict[str, pa.Schema] = {
    "images": IMAGES,
    "image_embeds/clip": image_embeds_schema(4),
    "captions/a": CAPTIONS,
    "captions/b": CAPTIONS,
    "scores/clip/a": SCORES,
    "scores/clip/original": SCORES,
    "image_scores/aesthetic": IMAGE_SCORES,
    "samples/night": SAMPLES,
    "latents/ae-64": LATENTS,
}
VLM = CaptionerConfig(
    name="a", model="zoo://captioner-a", batch_size=3, device="cpu", max_reject_share=0.7, resources=Resources(num_actors=2)
)
CAPTION = replace(VLM, revision="r", prompt="Say {caption}.", quality=QualityConfig(budget_tokenizer="zoo://clip"))
VLLM = replace(VLM, engine="vllm", vllm=VllmConfig(engine_args={"quantization": "fp8"}, batch_size=7))
HTTP = replace(VLM, engine="http", http=HttpConfig(image_format="jpeg", extra={"top_k": 1}, timeout=3))
SCORE = ScorerConfig(name="clip", model="zoo://clip", captioners=("a", "b"), batch_size=5, device="cpu")
LABEL = ImageScorerConfig(name="w", model="zoo://clip", label="1", batch_size=5)
HEAD = ImageScorerConfig(name="w", clip="clip", head="head.pth")
AE = ExtractConfig(name="ae", autoencoder="zoo://pipeline/autoencoder", resolution=64, check_rows=9, prepare_threads=2)
LARGE = replace(AE, resolution=2048, tile_size=512, max_upscale=1.5)
EMBED = EmbedConfig(name="gemma", text_encoder="zoo://pipeline/text_encoder", captioners=("a", "b"), batch_size=4)
DRAW = DrawConfig(height=64, batch_size=2, device="cpu")
SAMPLE = SampleConfig(name="night", pipeline="zoo://pipeline", prompts=["a", "b"], draw=DRAW)
CLIP_SCORE = ClipScoreConfig(model="zoo://clip", batch_size=2)
DATA = StreamConfig(captioners=("original", "a"), clip="clip", image_filters={"aesthetic": ImageFilter(min=5.0)})
TRAIN = TrainConfig(
    latents="latents/ae-64", data=DATA, init="zoo://pipeline", num_steps=4, micro_batch_size=1, global_batch_size=2,
    lora=LoraConfig(), keep_every=3, seed=5,
)  # fmt: skip
STAGES: dict[str, tuple[Callable[[str], object], str]] = {
    "caption": (lambda uri: run_caption(uri, CAPTION), "60b7c9e31e3993de"),
    "caption by vllm": (lambda uri: run_caption(uri, VLLM), "db7b4401a6af1bb1"),
    "caption by http": (lambda uri: run_caption(uri, HTTP), "d5caa120109e8716"),
    "embed_images": (lambda uri: run_image_embeds(uri, SCORE.clip), "9bd35ae3b79e8d3c"),
    "score": (lambda uri: run_score(uri, SCORE, "a"), "cb6299014f793416"),
    "score of the original captions": (lambda uri: run_score(uri, SCORE, "original"), "04cfe3f9aef60b47"),
    "score_images by label": (
        lambda uri: run_image_scores(uri, LABEL),
        "658082a4acf1ef90",
    ),
    "score_images by head": (
        lambda uri: run_image_scores(uri, HEAD),
        "0d65cddb45c603f7",
    ),
    "duplicates": (
        lambda uri: run_duplicates(uri, DuplicatesConfig(max_distance=2)),
        "853ef0a50e00fe63",
    ),
    "semantic duplicates": (
        lambda uri: run_duplicates(uri, SemanticConfig(clip="clip", min_similarity=0.9)),
        "93bc1ba94a11e2b7",
    ),
    "extract": (lambda uri: run_extract(uri, AE), "325e73cbe5c2df30"),
    "extract at 2048": (
        lambda uri: run_extract(uri, LARGE),
        "97a9f0eca990c129",
    ),
    "embed_captions": (
        lambda uri: run_embed_captions(uri, EMBED, "a"),
        "cd48d29ba3774805",
    ),
    "sample": (lambda uri: run_sample(uri, SAMPLE), "21636580ff530f36"),
    "evaluate": (
        lambda uri: run_metric(uri, sampled_pictures(uri, "night"), "clip_score", CLIP_SCORE),
        "a4606e6345d1f0c5",
    ),
    "evaluate shapes": (
        lambda uri: run_metric(uri, sampled_pictures(uri, "night"), "shapes", ShapesJudgeConfig(prepare_threads=2)),
        "cc4a5df2533b6ca4",
    ),
}
"""By name: what runs a stage, and how the fingerprint began that its table had when this test was written."""


class Claimed(Exception):
    """Carries the identity with which a stage begins to write its table."""

    def __init__(self, identity: Identity):
        super().__init__(identity)
        self.identity = identity


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of empty tables; from now on, whatever would write into one raises Claimed."""
    for path, schema in TABLES.items():
        table = Table(str(tmp_path / "data"), path, schema)
        settings = {"path": path} | ({"width": 4} if path == "image_embeds/clip" else {})
        table.write_manifest(replace(table.claim(Identity("x", settings, {}, {})), complete=True))
    torch.save({"layers.0.weight": torch.zeros(1, 4), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.pth")
    monkeypatch.chdir(tmp_path)

    def claim(table: Table, identity: Identity, *, ticket: object) -> None:
        raise Claimed(identity)

    monkeypatch.setattr(Table, "claim", claim)
    return str(tmp_path / "data")


def fingerprint(identity: Identity) -> str:
    """Its first digits, with the same version for each model: the tiny ones may be made anew."""
    return replace(identity, models=dict.fromkeys(identity.models, "v")).fingerprint[:16]


@pytest.mark.parametrize("name", STAGES)
def test_the_fingerprint_of_a_table_stays_as_it_was(name: str, dataset: str) -> None:
    run, expected = STAGES[name]
    with pytest.raises(Claimed) as claimed:
        run(dataset)
    identity = claimed.value.identity
    assert fingerprint(identity) == expected, json.dumps(asdict(identity), indent=1)
    assert json.loads(json.dumps(identity.config)) == identity.config  # a manifest gives back the very same


def test_the_fingerprint_of_the_images_stays_as_it_was(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/urls.csv").write_text("url\nhttp://host/x.png\n")
    download = DownloadConfig(connections=3, obey_robots_tag=False)
    config = IngestConfig(source=str(tmp_path / "raw"), base_uri="s3://b", download=download, license="CC0")
    with pytest.raises(Claimed) as claimed:
        run_ingest(dataset, config)
    identity = claimed.value.identity
    settings = {**identity.config, "source": "/raw", "first_listing": "abc"}
    assert fingerprint(replace(identity, config=settings)) == "7004be27cb86aa7d", settings


def test_the_fingerprints_of_imported_captions_and_scores_stay_as_they_were(tmp_path: Path, dataset: str) -> None:
    """Where the scores go, and how they are read, changes no caption."""
    (tmp_path / "x.jsonl").write_text("{}")
    config = ImportConfig(name="a", source=str(tmp_path / "x.jsonl"), score_scale=100, max_reject_share=0.5)
    expected = {"captions": "e61424254cdcb099", "scores": "0cb3daca800cc2be"}
    for clip in ("clip", "other"):
        importer = CaptionImport(dataset, replace(config, clip=clip))
        with pytest.raises(Claimed) as claimed:
            importer.run()
        identity = replace(claimed.value.identity, config=claimed.value.identity.config | {"source": ["/x.jsonl"]})
        assert fingerprint(identity) == expected["captions"], json.dumps(asdict(identity), indent=1)
        scores = replace(importer.scores_identity, inputs={"captions/a": "1"})
        assert fingerprint(scores) == expected["scores"], json.dumps(asdict(scores), indent=1)


def test_the_fingerprint_of_a_training_stays_as_it_was(dataset: str) -> None:
    identity = train_identity(dataset, TRAIN)
    assert fingerprint(identity) == "56d78d4edb8d1ab4", json.dumps(asdict(identity), indent=1)


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    threads: int = 4

    NO_VALUE: ClassVar = ("threads",)


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=Inner)
    parts: list[Inner] = field(default_factory=lambda: [Inner(lr=0.2)])
    limits: dict[str, Inner] = field(default_factory=lambda: {"a": Inner()})

    added: tuple[int, ...] = ()
    added_part: Inner = field(default_factory=Inner)

    NO_VALUE: ClassVar = ("name",)
    SINCE: ClassVar = ("added", "added_part")


def test_all_settings_count_but_those_that_a_class_names() -> None:
    assert value_settings(Outer()) == {
        "sizes": [1, 2], "inner": {"lr": 0.1}, "parts": [{"lr": 0.2}], "limits": {"a": {"lr": 0.1}}
    }  # fmt: skip


def test_a_field_that_was_added_counts_unless_it_has_its_default() -> None:
    settings = value_settings(Outer(added=(3,), added_part=Inner(lr=0.3)))
    assert settings == value_settings(Outer()) | {"added": [3], "added_part": {"lr": 0.3}}


def test_a_name_that_is_no_field_is_a_mistake() -> None:
    for name in ("NO_VALUE", "SINCE"):

        @dataclass
        class Misspelt:
            batch_size: int = 1

        setattr(Misspelt, name, ("batchsize",))
        with pytest.raises(AssertionError, match="batchsize"):
            value_settings(Misspelt())
