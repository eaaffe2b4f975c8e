"""Names of tables, shards, captioners, trainings: no configuration, manifest or plan leads out of the dataset's folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.select import SelectConfig
from jobs.train import TrainJob
from pipelines.audit.rebuild import delete_table
from pipelines.caption.config import CaptionerConfig
from pipelines.caption.imports.config import ImportConfig
from pipelines.draw.config import SampleConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.extract.config import EmbedConfig, ExtractConfig
from pipelines.score.config import ClipConfig, ImageScorerConfig, ScorerConfig, SemanticConfig
from pipelines.tables.schema import CAPTIONS
from pipelines.tables.table import Table
from pipelines.train.config import TrainConfig
from pipelines.train.stream.config import StreamConfig

ODD = (
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a/../../x",
    "/tmp/x",
    ".x",
    "_x",
    "*",
    "a?",
    "[a]",
    "a\\b",
    "a::b",
    " a",
    "a\n",
    "a\0",
    "x" * 256,
)
PLAIN = ("llava-1.5", "a b", "qwen2.5:7b", "模型", "a..b", "x" * 255)


def train(name: str = "t", **settings: object) -> TrainConfig:
    data = StreamConfig(captioners=("a",), clip="c")
    return TrainConfig(
        latents=name, init="zoo://pipeline", num_steps=1, micro_batch_size=1, global_batch_size=1, data=data, **settings
    )


NAMED: dict[str, Callable[[str], object]] = {
    "captioner": lambda name: CaptionerConfig(name=name, model="x"),
    "imported captions": lambda name: ImportConfig(name=name, source="x"),
    "imported scores": lambda name: ImportConfig(name="x", source="x", clip=name),
    "clip": lambda name: ClipConfig(name=name, model="x"),
    "scored captioner": lambda name: ScorerConfig(name="x", model="x", captioners=(name,)),
    "image scorer": lambda name: ImageScorerConfig(name=name, model="x", label="x"),
    "head's clip": lambda name: ImageScorerConfig(name="x", clip=name, head="x"),
    "duplicates' clip": lambda name: SemanticConfig(clip=name),
    "latents": lambda name: ExtractConfig(name=name, autoencoder="x", resolution=32),
    "embeddings": lambda name: EmbedConfig(name=name, text_encoder="x", captioners=("x",)),
    "embedded captioner": lambda name: EmbedConfig(name="x", text_encoder="x", captioners=(name,)),
    "pictures": lambda name: SampleConfig(name=name, pipeline="x", prompts=[]),
    "evaluation": lambda name: EvaluateConfig(name=name),
    "training": lambda name: TrainJob(dataset_uri="x", train=train("latents/x"), name=name),
    "training's captioner": lambda name: StreamConfig(captioners=(name,), clip="x"),
    "training's clip": lambda name: StreamConfig(captioners=("x",), clip=name),
    "training's filter": lambda name: StreamConfig(captioners=("x",), clip="x", image_filters={name: None}),  # type: ignore[dict-item]
    "training's embeddings": lambda name: train("latents/x", caption_embeds=name),
    "selection's clip": lambda name: SelectConfig(dataset_uri="x", clip=name),
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_a_name_is_that_of_a_folder_in_the_dataset(make: Callable[[str], object]) -> None:
    for name in ODD:
        with pytest.raises(ValueError, match="plain folder name"):
            make(name)
    for name in PLAIN:
        make(name)


@pytest.mark.parametrize("name", ["images", "captions", "rejects", "samples"])
def test_a_training_is_no_folder_of_tables(name: str) -> None:
    with pytest.raises(ValueError, match=f"name='{name}' is the folder of tables"):
        TrainJob(dataset_uri="x", train=train("latents/x"), name=name)


@pytest.mark.parametrize("path", ["..", "../x", "captions/../../x", "/etc", "", "captions/a\0b"])
def test_tables_and_shards_lie_in_their_dataset(path: str) -> None:
    with pytest.raises(ValueError, match="the name "):
        Table("data", path, CAPTIONS)
    with pytest.raises(ValueError, match="the name "):
        train(path)
    with pytest.raises(ValueError, match="the name "):
        Table("data", "captions/x", CAPTIONS).shard_uri(path)


def test_a_deletion_follows_no_links(tmp_path: Path) -> None:
    """A dataset from a stranger may hold links to folders and files of whoever deletes one of its tables."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("x")
    table = Table(str(tmp_path / "data"), "captions/x", CAPTIONS)
    table.write_shard("00000", CAPTIONS.empty_table())
    for place in (table.uri, f"{table.uri}/_deep", table.rejects().uri):
        Path(place).mkdir(exist_ok=True, parents=True)
        Path(place, "_folder").symlink_to(mine)
        Path(place, "_file").symlink_to(mine / "precious")
    delete_table(table)
    assert (mine / "precious").read_text() == "x" and not list(Path(table.uri).rglob("*.parquet"))
