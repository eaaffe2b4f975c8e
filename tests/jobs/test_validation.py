"""jobs.train with `validation`: pictures are judged beside the training, and the best checkpoint can be drawn with."""

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch

from jobs import compare, sample, train
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.common.resources import find_needs
from pipelines.evaluate.checkpoints import with_absolute_references
from pipelines.tables.schema import SAMPLES
from pipelines.tables.table import Table
from pipelines.train.engine.checkpoints import read_weights
from pipelines.train.engine.judgements import find_named, read_best, read_judgements
from pipelines.workers.images import decode
from sana_model.pipeline import TextToImage
from tests.support.training_world import CLIP, PATH, make_pipeline, make_shards, make_table

PROMPTS = ["--validation.prompts", '["a red square", "a blue square", "a green square"]']


def arguments(data: Path, init: str) -> list[str]:
    """Of a training."""
    settings = {
        "dataset_uri": data,
        "train.latents": PATH,
        "train.data.captioners": '["a", "b"]',
        "train.data.clip": CLIP,
        "train.init": init,
        "train.num_steps": 12,
        "train.micro_batch_size": 4,
        "train.global_batch_size": 8,
        "train.engine.zero_stage": 0,
        "train.engine.dtype": "fp32",
        "train.keep_checkpoints": 1,
    }
    return spell(settings)


def spell(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.mark.usefixtures("local_ray", "without_ray")
def test_pictures_are_judged_beside_the_training_and_the_best_checkpoint_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "data/train"
    make_table(data, make_shards([30, 20]))
    validation = {
        "validation.every": 4,
        "validation.num_prompts": 2,
        "validation.metrics": "[clip_score, hps]",
        "validation.clip_score.model": "zoo://clip",
        "validation.hps.model": data / "gone",
        "validation.draw": '{"num_steps": 2, "guidance_scale": 1.0}',
        "validation.best": '{"figure": "clip_score", "direction": "highest"}',
    }
    given = [*arguments(data, make_pipeline(tmp_path / "init")), *PROMPTS, *spell(validation)]
    assert train.main(given) == ExitCode.DONE
    judged = read_judgements(str(out / "checkpoints"))
    assert set(judged) == {4, 8, 12}  # the second while the first ran
    told = capsys.readouterr().err
    for step in (4, 12):
        assert set(judged[step].figures) == {"clip_score"} and "gone" in judged[step].problems["hps"]
        assert judged[step].seconds.keys() == {"pictures", "clip_score", "hps", "total"} and judged[step].where
        assert 0 < judged[step].held_seconds < 10
        assert f"step {step}: clip_score {judged[step].figures['clip_score']:.4g}; not judged by hps: no file or folder" in told
    client = mlflow.MlflowClient(f"sqlite:///{data}/mlflow.db")
    (run,) = client.search_runs(["0", "1"])
    history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "clip_score")}
    assert history == {step: one.figures["clip_score"] for step, one in judged.items() if one.figures}
    assert run.info.status == "FINISHED" and run.data.metrics["judgement_seconds"] == judged[12].seconds["total"]
    assert run.data.tags["judgement.000012"].startswith("step 12: clip_score")
    best = read_best(str(out / "checkpoints"))
    assert best is not None and best.value == max(history.values())
    uri = find_named(str(out / "checkpoints/best"))
    weights = read_weights(uri)
    written = TextToImage.from_pretrained(out / "best").transformer.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in written.items())
    assert "Judged checkpoints" in (out / "report.html").read_text()
    drawn = ["--dataset_uri", str(data), "--sample.name", "again", "--sample.pipeline", f"{out}/checkpoints/best"]
    drawn += ["--sample.prompts", '["a red square"]', "--sample.draw.num_steps", "2", "--sample.draw.guidance_scale", "1.0"]
    assert sample.main(drawn) == ExitCode.DONE
    own, again = (
        Table(str(folder), f"samples/{name}", SAMPLES).read_shard("00000").to_pylist()
        for folder, name in ((out / "validation", f"step-{best.step:06d}"), (data, "again"))
    )
    assert [row["prompt"] for row in own] == ["a red square", "a blue square"] and own[0]["seed"] == 0
    assert decode(own[0]["image_bytes"]).tobytes() == decode(again[0]["image_bytes"]).tobytes()
    names = "[step-000004, step-000012]"
    assert compare.main(["--dataset_uri", str(out / "validation"), "--names", names]) == ExitCode.DONE


def test_what_cannot_be_judged_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path, "zoo://pipeline")
    for more, code, said in (
        (["--validation.prompts", "gone.txt"], ExitCode.WRONG_INPUT, "there is no file 'gone.txt'"),
        ([*PROMPTS, "--validation.clip_score.resources.num_gpus", "1"], ExitCode.USAGE, "give validation.resources instead"),
        ([*PROMPTS, "--validation.metrics", "[]"], ExitCode.USAGE, "metrics=[] names none"),
        ([*PROMPTS, "--validation.every", "0"], ExitCode.USAGE, "every=0 must be at least 1"),
    ):
        try:
            assert train.main([*given, *more]) == code
        except SystemExit as ended:
            assert ended.code == code
        assert said in capsys.readouterr().err
    job = parse_config(train.TrainJob, [*given, *PROMPTS], prog="train", description="")
    assert [need.setting for need in find_needs(job)] == ["train.resources", "validation.resources"]
    assert job.validation is not None
    compared = replace(job.validation, metrics=("cmmd",), cmmd=replace(job.validation.cmmd, reference="images"))
    assert with_absolute_references(compared, "s3://b/data").cmmd.reference == "s3://b/data/images"
