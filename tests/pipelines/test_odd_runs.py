"""Odd runs of the stages: a picture or an embedding of values that are not finite is never written as if it were one."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlflow
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.sampler import Sampler
from pipelines.evaluate.clip_score import ClipScore
from pipelines.evaluate.config import ClipScoreConfig
from pipelines.evaluate.run import MetricWorker
from pipelines.extract.config import ExtractConfig
from pipelines.extract.encode import LatentEncoder, find_encoder
from pipelines.shapes.drawing import draw_row
from pipelines.stages.contract import Resources
from pipelines.stages.run import run_shards
from pipelines.tables.errors import WrongInputError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import SAMPLES, samples_path
from pipelines.tables.table import Table
from pipelines.tracking import patient_run
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.runs import RunRequest
from pipelines.tracking.unsent import UNSENT, Entry, read_unsent, write_unsent
from pipelines.train.config import GridConfig
from pipelines.train.engine.checkpoint_store import CheckpointStore
from pipelines.train.loop.driver_run import DriverRun
from pipelines.train.loop.outputs import TrainOutputs
from pipelines.train.loop.task import TrainTask
from pipelines.workers.images import to_png
from pipelines.workers.models import FoundModel
from sana_model.files.models import load_autoencoder, save_autoencoder
from sana_model.pipeline import TextToImage
from tests.support.one_worker import one_worker
from tests.support.training_ranks import tiny_config, train_on_ranks
from tests.support.training_world import make_pipeline, make_shards, make_table

DRAW = DrawConfig(num_steps=2, batch_size=4, dtype="float32")
SAMPLE = SampleConfig(name="odd", pipeline="zoo://pipeline", prompts=["a red circle"], draw=DRAW)
PROMPTS = ["a red circle", "a blue star", "a green square"]


def prompts_table() -> pa.Table:
    return pa.table({"id": ["0", "1", "2"], "prompt": PROMPTS, "seed": [0, 1, 2], "number": [0, 1, 2]})


def picture_table() -> pa.Table:
    content = to_png(Image.fromarray(draw_row(1)[1]))
    return pa.table({"id": ["0"], "prompt": PROMPTS[:1], "image_bytes": [content], "source_uri": ["x.png"]})


def one_prompt_overflows() -> Sampler:
    """A pipeline whose embedding of one word is finite, and what is computed with it is not."""
    sampler = Sampler(SAMPLE, FoundModel("zoo://pipeline", None, "v1"))
    encoder = sampler.pipeline.text_encoder
    (token,) = set(encoder.tokenizer.encode("a blue star")) - set(encoder.tokenizer.encode("a blue circle"))
    encoder.model.embed_tokens.weight.data[token] = 3e38
    return sampler


def decoder_overflows() -> LatentEncoder:
    encoder = LatentEncoder(ExtractConfig(name="x", autoencoder="zoo://pipeline/autoencoder", resolution=64))
    for weight in encoder.autoencoder.decoder.conv_in.parameters():
        weight.data.fill_(3e38)
    return encoder


def judge_overflows() -> MetricWorker:
    judge = MetricWorker("clip_score", ClipScoreConfig(model="zoo://clip"))
    assert isinstance(judge.metric, ClipScore)
    judge.metric.clip.model.text_projection.weight.data.fill_(float("nan"))
    return judge


ONE_BAD: dict[str, tuple[Callable[[], Sampler | MetricWorker], Callable[[], pa.Table], list[str], tuple[str, str]]] = {
    "sample": (
        one_prompt_overflows,
        prompts_table,
        ["0", "2"],
        ("not_finite", "the text encoder .* in float32, for 1 of 1"),
    ),
    "evaluate": (judge_overflows, picture_table, [], ("bad_score", "zoo://clip gives values that are not finite, in float32")),
}


@pytest.mark.parametrize("stage", ONE_BAD)
def test_what_is_not_finite_is_a_reject(stage: str) -> None:
    make, table, kept, (reason, detail) = ONE_BAD[stage]
    rows, rejects, _ = make().process(table())
    assert isinstance(rows, list) and [row["id"] for row in rows] == kept
    ((found, told),) = [(row["reject_reason"], row["detail"]) for row in rejects]
    assert found == reason and re.match(detail, told), told


def test_a_decoder_that_overflows_is_counted_and_gives_no_psnr() -> None:
    figures = decoder_overflows().process(picture_table()).figures
    assert figures["num_decoded_not_finite"] == 1 and "psnr" not in figures and figures["latents_std"] > 0


def spoil(folder: Path) -> str:
    """Save an autoencoder with a weight of NaN in its encoder, and in its decoder."""
    model = load_autoencoder("zoo://pipeline/autoencoder")
    for part in (model.encoder, model.decoder):
        part.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    save_autoencoder(model, folder)
    return str(folder)


def test_weights_that_are_not_finite_stop_the_stage(tmp_path: Path, local_ray: None) -> None:
    """No picture of such a pipeline would be good: the first one ends the stage as wrong input, and none is written."""
    with pytest.raises(ValueError, match=r"its weights encoder.conv_in.* are not finite"):
        find_encoder(spoil(tmp_path / "ae"))
    pipeline = TextToImage.from_pretrained("zoo://pipeline")
    pipeline.transformer.head.weight.data[0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "pipeline")
    table = Table(str(tmp_path), samples_path("odd"), SAMPLES)
    with pytest.raises(WrongInputError, match=r"^the transformer gives .* its weights .*head.weight.* are not finite"):
        run_shards(
            table,
            Identity("sample", {}, {}, {}),
            ["00000"],
            read_shard=lambda shard: prompts_table(),
            make_worker=partial(Sampler, SAMPLE, FoundModel(str(tmp_path / "pipeline"), None, "v1")),
            resources=Resources(num_cpus=0.5),
            max_reject_share=0.0,
        )
    assert table.list_shards() == []


def test_a_grid_that_is_not_finite_is_told_and_costs_no_training(tmp_path: Path) -> None:
    make_table(tmp_path / "dataset", make_shards([8]))
    config = tiny_config(make_pipeline(tmp_path / "init"))
    grid = GridConfig(prompts=["a red square"], every=2, num_steps=1)
    config = replace(config, autoencoder=spoil(tmp_path / "ae8"), num_steps=2, grid=grid)
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    trained = train_on_ranks(tmp_path, tmp_path / "dataset", [("run", config)], tracking=tracking)["run"]
    assert trained.error is None and list(trained.losses) == [1, 2]
    (run,) = mlflow.MlflowClient(tracking.uri).search_runs(["1"])
    assert re.match(
        r"a grid is not drawn: the decoder .* its weights conv_in.weight are not finite", run.data.tags["notice.001"]
    )
    assert not (tmp_path / "run" / "samples").exists() and (tmp_path / "run" / "pipeline" / "pipeline.json").exists()


def test_guidance_of_a_grid_must_be_finite() -> None:
    for config in (GridConfig, DrawConfig):
        with pytest.raises(ValueError, match="guidance_scale=nan must be a finite number"):
            config(guidance_scale=float("nan"))


def test_what_mlflow_did_not_get_is_kept_beside_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that MLflow never answers, then one from the checkpoint of step 10, whose steps after 10 are made again."""
    monkeypatch.setattr(patient_run, "CLOSE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def outputs(tracking_uri: str) -> TrainOutputs:
        tracking = TrackingConfig(uri=tracking_uri)
        request = RunRequest.make("train", {}, tracking=tracking, output_dir=tmp_path, key="a")
        task = {"config": tiny_config("init"), "dataset_uri": "d", "inputs": {"latents/x": "beef"}}
        return TrainOutputs(TrainTask(**task, output_uri=str(tmp_path / "out"), run_request=request), rank=0)

    store = CheckpointStore(str(tmp_path / "checkpoints"), keep_last=1, say=print)
    with one_worker():
        first = outputs("http://127.0.0.1:9")
        first.begin(0, [], store)
        for step in (10, 20):
            first.log_metrics(step, {"loss": 30.0 / step})
            first.show_picture(step, Image.new("RGB", (4, 4)))
        waiting = [(10, {"loss": 3.0})]  # as the checkpoint of step 10 has it
        first.close()
        kept = read_unsent(str(tmp_path / "out"))
        assert [(entry.kind, entry.step) for entry in kept if entry.step] == [
            *(("metrics", 10), ("image", 10), ("metrics", 20), ("image", 20))
        ]
        write_unsent(str(tmp_path / "out"), [*kept, Entry("end", "FAILED")])
        second = outputs(uri)
        second.begin(10, waiting, store)
        second.log_metrics(20, {"loss": 1.25})
        second.close()
    assert not (tmp_path / "out" / UNSENT).exists()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["1"])
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [
        (10, 3.0),
        (20, 1.25),
    ]
    assert run.info.status == "RUNNING" and [entry.dataset.digest for entry in run.inputs.dataset_inputs] == ["beef"]
    pictures = [Path(one.path).name for one in client.list_artifacts(run.info.run_id, "images") if one.path.endswith(".png")]
    assert len(pictures) == 1 and "step%10" in pictures[0].replace("+", "%")


def test_the_end_of_a_training_waits_before_it_is_sent(tmp_path: Path) -> None:
    """Whatever ends the driver meanwhile: the next start finds a finished training, and tells MLflow of its end."""
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    request, out = RunRequest.make("train", {}, tracking=tracking, output_dir=tmp_path, key="a"), str(tmp_path / "out")
    request.connect()
    DriverRun(request, out, print).keep(Entry("metrics", {"seconds": 2.0}, 4), Entry("end", "FINISHED"))
    (run,) = mlflow.MlflowClient(tracking.uri).search_runs(["1"])
    assert run.info.status == "RUNNING" and (tmp_path / "out" / UNSENT).exists()
    assert DriverRun(request, out, print).send() is None
    (run,) = mlflow.MlflowClient(tracking.uri).search_runs(["1"])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"seconds": 2.0}) and not (tmp_path / "out" / UNSENT).exists()
