"""Drawing as a command: pictures from pictures, and a picture that is drawn again from what it says about itself."""

from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import best_of
from jobs.common import job as job_module
from jobs.common.config import parse_config
from jobs.sample import SampleJob, main, take_from_picture
from pipelines.tables.schema import SAMPLES, Row
from pipelines.tables.table import Table
from sana_model.files.png import set_facts, to_png

FACTS = {
    "prompt": 'a "red"\n円, [circle]: #1', "seed": 7, "model": "zoo://pipeline", "dtype": "float32",
    "settings": {
        "height": 64, "width": 96, "num_steps": 3, "guidance_scale": 2.5, "guidance_interval": [0.1, 0.9],
        "negative_prompt": "null", "solver": "flow_euler", "strength": None, "integer_timesteps": False,
    },
}  # fmt: skip


def png(facts: dict[str, object] | None) -> bytes:
    image = Image.new("RGB", (8, 8))
    if facts is not None:
        set_facts(image, facts)
    return to_png(image)


def rows_of(dataset: Path, name: str) -> list[Row]:
    table = Table(str(dataset), f"samples/{name}", SAMPLES)
    return [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]


def pixels(row: Row) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(row["image_bytes"]))).astype(int)


def parse(arguments: list[str]) -> SampleJob:
    return parse_config(SampleJob, take_from_picture(arguments), prog="sample", description="")


@pytest.mark.usefixtures("local_ray", "without_ray")
def test_pictures_from_a_picture_are_drawn_again_from_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_module, "start_ray", lambda config: nullcontext())
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    start.save(tmp_path / "start.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    settings = ["--sample.pipeline", "zoo://pipeline", "--sample.prompts", "[a red circle, a blue square]"]
    settings += ["--sample.draw.num_steps", "3", "--sample.images_per_prompt", "3", "--sample.draw.rows_per_shard", "4"]
    settings += ["--sample.start.image", str(tmp_path / "start.png"), "--sample.start.mask", str(tmp_path / "mask.png")]
    to = ["--dataset_uri", str(tmp_path / "data"), "--sample.name"]
    assert main([*to, "first", *settings, "--sample.draw.seed", "5"]) == 0
    first = rows_of(tmp_path / "data", "first")
    assert [(row["id"], row["prompt"], row["seed"]) for row in first] == [
        (f"{i:06d}", ("a red circle", "a blue square")[i // 3], 5 + i) for i in range(6)
    ]
    for row in first:
        assert np.abs(pixels(row) - np.asarray(start))[:, 32:].max() == 0 < np.abs(pixels(row) - np.asarray(start)).max()
    picture = f"{tmp_path}/data/samples/first#000004"
    assert main([*to, "again", "--from_picture", picture]) == 0
    (again,) = rows_of(tmp_path / "data", "again")
    assert again["prompt"] == "a blue square" and again["seed"] == 9
    assert np.abs(pixels(again) - pixels(first[4])).max() <= 1 < np.abs(pixels(again) - pixels(first[5])).max()
    told = capsys.readouterr()
    assert "note:" not in told.err, "the same version of the pipeline"
    assert f"the first pictures: {tmp_path}/data/samples/again/grid.png" in told.out
    assert (tmp_path / "data/samples/again/grid.png").exists()


@pytest.mark.parametrize(
    ("pipeline", "prompts", "told"),
    [
        ("zoo://pipeline", "absent.txt", "there is no file 'absent.txt'"),
        ("zoo://pipeline", "blank.txt", "prompts='blank.txt' holds no prompt"),
        ("zoo://pipelin", "[a cat]", "the zoo holds no 'pipelin'"),
        ("train/checkpoints/step-000010", "[a cat]", "step-000010"),
    ],
)
def test_prompts_and_a_pipeline_that_are_not_there_are_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pipeline: str, prompts: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_module, "start_ray", lambda config: pytest.fail("Ray starts"))
    (tmp_path / "blank.txt").write_text("\n  \n")
    drawn = ["--dataset_uri", "data", "--sample.name", "x", "--sample.pipeline", pipeline, "--sample.prompts", prompts]
    for command, more in ((main, []), (best_of.main, ["--sample.images_per_prompt", "2", "--best_of.name", "best"])):
        assert command([*drawn, *more]) == 1
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_the_settings_of_a_picture_stand_between_the_yaml_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(FACTS))
    (tmp_path / "x.yaml").write_text("{dataset_uri: d, sample: {name: x, pipeline: p, prompts: [p], draw: {num_steps: 9}}}")
    config, picture = ["--config", str(tmp_path / "x.yaml")], ["--from_picture", str(tmp_path / "x.png")]
    sample = parse([*config, *picture]).sample
    assert sample.prompts == [FACTS["prompt"]] and sample.pipeline == "zoo://pipeline" and sample.start is None
    draw = sample.draw
    assert (draw.height, draw.width, draw.num_steps, draw.guidance_scale, draw.seed) == (64, 96, 3, 2.5, 7)
    assert (draw.guidance_interval, draw.negative_prompt, draw.solver, draw.dtype) == (
        (0.1, 0.9),
        "null",
        "flow_euler",
        "float32",
    )
    for order in ([*picture, "--sample.draw.num_steps", "5"], ["--sample.draw.num_steps=5", f"{picture[0]}={picture[1]}"]):
        changed = parse([*config, *order]).sample.draw
        assert changed.num_steps == 5 and changed.height == 64
    assert parse(["--dataset_uri", "d", *picture, "--sample.name", "x"]).sample.draw == draw
    masked = FACTS | {"settings": {"strength": 0.3}, "image": "a.png", "mask": "b.png"}
    (tmp_path / "y.png").write_bytes(png(masked))
    start = parse([*config, "--from_picture", str(tmp_path / "y.png")]).sample.start
    assert start is not None and (start.image, start.mask, start.strength) == ("a.png", "b.png", 0.3)


def test_what_a_yaml_file_starts_from_is_not_part_of_a_picture_drawn_from_noise(tmp_path: Path) -> None:
    (tmp_path / "a#1.png").write_bytes(png(FACTS))  # a file, and no picture of a table
    (tmp_path / "x.yaml").write_text("{dataset_uri: d, sample: {name: x, start: {image: a.png}, control: {image: b.png}}}")
    again = ["--config", str(tmp_path / "x.yaml"), "--from_picture", str(tmp_path / "a#1.png")]
    sample = parse(again).sample
    assert sample.start is None and sample.control is None
    other = parse([*again, "--sample.start.image", "z.png"]).sample
    assert other.start is not None and other.start.image == "z.png" and other.control is None


def test_the_example_of_a_controlnet_is_taken() -> None:
    sample = parse(["--config", "jobs/configs/sample_control.yaml", "--sample.control.detector", "canny"]).sample
    assert sample.control is not None and (sample.control.detector, sample.control.scribble) == ("canny", 2)


def test_a_picture_that_cannot_be_drawn_again_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (8, 8))
    image.info["sana"] = "[1]"
    files = {
        "plain.png": png(None), "text.png": b"text", "noise.png": png(FACTS | {"seed": None}), "list.png": to_png(image),
        "cut.png": png(FACTS)[:150], "no_prompt.png": png({"seed": 1}), "odd.png": png(FACTS | {"settings": [1]}),
        "start.png": png(FACTS | {"settings": {"strength": 0.3}}),
        "control.png": png(FACTS | {"settings": {"control_scale": 1}}),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "x.yaml").write_text(f"from_picture: {tmp_path}/plain.png")
    told = {
        "plain.png": "plain.png: the picture does not say how it was drawn",
        "text.png": "text.png cannot be read as a picture: not_an_image",
        "list.png": "holds a list, not an object",
        "cut.png": "cut.png cannot be read as a picture: truncated",
        "no_prompt.png": "no_prompt.png was not drawn by this project: its facts say prompt=None",
        "odd.png": "its facts say settings=[1]",
        "start.png": "does not say which picture its start was: give it by --sample.start.image",
        "control.png": "does not say which picture its control was: give it by --sample.control.image",
        "noise.png": "was drawn from a generator's noise",
        "absent.png": "absent.png",
        "latents/x#1": "is no picture of a samples table",
        "samples/x#1": "has no picture '1'",
    }
    for name, message in told.items():
        assert main(["--dataset_uri", "d", "--sample.name", "x", "--from_picture", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    arguments = ["--config", str(tmp_path / "x.yaml"), "--dataset_uri", "d", "--sample.name", "x"]
    assert main([*arguments, "--sample.pipeline", "p", "--sample.prompts", "[a]"]) == 1
    assert "stands in a YAML file: give it on the command line" in capsys.readouterr().err
