"""Training from captions that were embedded before: as with the text encoder itself, and never from those of another one."""

from dataclasses import replace
from pathlib import Path

import mlflow
import pyarrow as pa
import pytest
import torch

from jobs.embed_captions import EmbedJob
from jobs.embed_captions import run as run_embed_job
from pipelines.extract.config import EmbedConfig
from pipelines.score.config import SelectionConfig
from pipelines.tables.errors import MissingTableError
from pipelines.tables.schema import CAPTION_EMBEDS
from pipelines.tables.table import Table
from pipelines.tracking.config import TrackingConfig
from pipelines.train.config import TrainConfig
from pipelines.train.host_text_encoder import HostTextEncoder
from pipelines.train.preflight.run import run_preflight
from pipelines.train.run import check_tables, train_identity
from pipelines.train.stream.captions import (
    DroppedCaption,
    encode_captions,
    list_caption_embeds,
    pad_embeds,
    read_caption_embeds,
)
from pipelines.train.stream.config import ValidationConfig, WeightedTable
from sana_model.nn.config import NullCaption, TextEncoderConfig
from sana_model.pipeline import TextToImage
from tests.support.training_ranks import tiny_config, train_on_ranks
from tests.support.training_world import PATH, STREAM, make_pipeline, make_shards, make_table
from tests.support.without_ray import run_without_ray

PROMPTS = TextEncoderConfig(instruction="User Prompt: ", max_tokens=32)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pipeline(tmp_path_factory.mktemp("init"))


def embed_config(init: str) -> EmbedConfig:
    encoder = f"{init}/text_encoder"
    captioners = STREAM.captioners
    return EmbedConfig(
        name="tiny", text_encoder=encoder, captioners=captioners, prompts=PROMPTS, compute_dtype="float32", batch_size=8
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, local_ray: None, init: str) -> Path:
    """Embedded by the job: the captions of a on Ray."""
    folder = tmp_path_factory.mktemp("dataset")
    make_table(folder, make_shards([30, 20, 26], ("64x64", "64x64", "32x128")))
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    job = EmbedJob(dataset_uri=str(folder), embed=embed_config(init), tracking=tracking)
    run_embed_job(replace(job, embed=replace(job.embed, captioners=("a",))))
    with pytest.MonkeyPatch.context() as patch:
        run_without_ray(patch)
        run_embed_job(job)
    return folder


@pytest.fixture(scope="module")
def config(init: str) -> TrainConfig:
    """Of two captions of each sample one is drawn, or none."""
    data = replace(STREAM, selection=SelectionConfig(policy="random"), caption_dropout=0.2, held_out_share=0.1)
    return replace(tiny_config(init), num_steps=20, data=data, validation=ValidationConfig(every=20), caption_embeds="tiny")


def test_the_job_embeds_every_caption(dataset: Path, init: str) -> None:
    (source,) = replace(tiny_config(init), caption_embeds="tiny").sources(str(dataset))
    for captioner in STREAM.captioners:
        manifest = source.embeds_table(captioner).require()
        assert manifest.complete and (manifest.num_shards, manifest.num_rows) == (3, 76)
        assert (dataset / "caption_embeds/tiny" / captioner / "report.html").exists()
    listed = list_caption_embeds(source, "00001")
    assert listed == {(f"{index:064x}", captioner) for index in range(30, 50) for captioner in STREAM.captioners}
    found = read_caption_embeds(source, "00001", listed)
    assert found.keys() == listed
    encoder = TextToImage.from_pretrained(init).text_encoder
    embeds, _ = encoder.encode(["a blue square"])
    torch.testing.assert_close(found[f"{30:064x}", "a"].float(), embeds[0].float(), atol=1e-2, rtol=1e-2)
    client = mlflow.MlflowClient(f"sqlite:///{dataset}/mlflow.db")
    experiment = client.get_experiment_by_name("sana")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.status, run.data.metrics["rows"]) for run in runs] == [("FINISHED", 76)] * 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_losses_are_those_of_the_text_encoder(tmp_path: Path, dataset: Path, config: TrainConfig, num_workers: int) -> None:
    """The table's bfloat16 rounds what the text encoder gives in float32."""
    stored = replace(config, num_workers=num_workers)
    trained = train_on_ranks(tmp_path, dataset, [("stored", stored), ("live", replace(stored, caption_embeds=None))])
    losses, live = (list(trained[name].losses.values()) for name in ("stored", "live"))
    worst = max(abs(one / other - 1) for one, other in zip(losses, live, strict=True))
    print(f"{num_workers} workers: the losses of {len(losses)} steps differ by {worst:.1e} at most")
    assert len(losses) == 20 and trained["stored"].error is None and worst < 1e-3
    validation = [trained[name].metrics["validation_loss"] for name in ("stored", "live")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-3)


def test_resumes_with_samples_that_wait(tmp_path: Path, dataset: Path, config: TrainConfig) -> None:
    config = replace(config, data=replace(config.data, shuffle_shards=1), validation=ValidationConfig())
    straight = train_on_ranks(tmp_path, dataset, [("straight", config), ("parts", replace(config, num_steps=7))])["straight"]
    assert train_on_ranks(tmp_path, dataset, [("parts", config)])["parts"].losses == straight.losses


@pytest.mark.parametrize("kind", ["own_mask", "caption_mask"])
def test_only_real_tokens_and_the_null_caption(init: str, kind: NullCaption) -> None:
    encoder = TextToImage.from_pretrained(init).text_encoder
    null, captions, dropped = DroppedCaption.encode(encoder, kind), ["a red square", "a ring", "blue"], [False, True, False]
    stored = [encoder.encode([one])[0][0] for one in captions]
    embeds, mask = pad_embeds(stored, dropped, null)
    expected, expected_mask = encode_captions(encoder, captions, dropped, null)
    assert torch.equal(mask, expected_mask) and mask.sum(1).tolist() == [5, 1 if kind == "own_mask" else 4, 3]
    torch.testing.assert_close(embeds, expected)
    assert torch.equal(embeds[1, mask[1]], null.rows[: mask[1].sum()]) and null.rows.any(dim=1).all()
    host = HostTextEncoder(encoder, torch.device("meta"))
    assert host.encode(["blue"])[0].device.type == "meta" and host.device.type == "cpu"


def test_embeddings_of_something_else_are_refused(dataset: Path, config: TrainConfig) -> None:
    check_tables(str(dataset), config)
    joined = {f"{table}/{captioner}" for table in ("captions", "scores/clip", "caption_embeds/tiny") for captioner in "ab"}
    assert train_identity(str(dataset), config).inputs.keys() == {PATH} | joined
    other = TextEncoderConfig(instruction="Say: ", max_tokens=16)
    with pytest.raises(ValueError, match="is not what this training's text encoder gives for the captions of a") as error:
        check_tables(str(dataset), replace(config, prompts=other))
    told = str(error.value)
    assert "config.instruction: 'sha256:" in told and "config.max_tokens: 32 -> 16" in told and "lowercase" not in told
    with pytest.raises(ValueError, match=r"models\.text_encoder: 'sha256:.* -> 'sha256:"):
        check_tables(str(dataset), replace(config, text_encoder="zoo://pipeline/text_encoder"))
    with pytest.raises(MissingTableError, match="no table 'caption_embeds/none/a'"):
        check_tables(str(dataset), replace(config, caption_embeds="none"))


def test_of_a_mixture_the_dataset_whose_captions_lack_embeddings_is_named(
    tmp_path: Path, dataset: Path, config: TrainConfig
) -> None:
    make_table(tmp_path, make_shards([8, 4], first=100))
    mixture = [WeightedTable(latents=PATH), WeightedTable(latents=PATH, dataset_uri=str(tmp_path), captioners=("b",))]
    config = replace(config, latents=mixture)
    with pytest.raises(MissingTableError, match=f"'caption_embeds/tiny/b' in {tmp_path}"):
        train_identity(str(dataset), config)
    table = Table(str(tmp_path), "caption_embeds/tiny/b", CAPTION_EMBEDS)
    made = Table(str(dataset), "caption_embeds/tiny/b", CAPTION_EMBEDS).require().identity()
    manifest = table.claim(replace(made, inputs={"captions/b": "older"}))
    with pytest.raises(ValueError, match=f"{table.uri} is not complete"):
        train_identity(str(dataset), config)
    table.write_manifest(replace(manifest, complete=True))
    with pytest.raises(ValueError, match=f"{table.uri} has no shard 00000"):
        train_identity(str(dataset), config)
    for shard in ("00000", "00001"):
        table.write_shard(shard, pa.Table.from_pylist([], CAPTION_EMBEDS))
    train_identity(str(dataset), config)
    with pytest.raises(ValueError, match=rf"{table.uri} .* for the captions of b:\n  inputs\.captions/b: 'older' -> '"):
        check_tables(str(dataset), config)


def test_a_dry_run_counts_no_text_encoder_on_the_device(dataset: Path, config: TrainConfig) -> None:
    stored, live = (
        run_preflight(str(dataset), replace(config, caption_embeds=name), device_gib=80.0) for name in ("tiny", None)
    )
    assert stored.problems == [] and "text encoder" in live.memory.parts and "text encoder" not in stored.memory.parts
    assert live.memory.total - stored.memory.total >= live.memory.parts["text encoder"]
    wrong = replace(config, prompts=replace(PROMPTS, max_tokens=16))
    (problem,) = run_preflight(str(dataset), wrong, device_gib=80.0).problems
    assert "config.max_tokens: 32 -> 16" in problem
