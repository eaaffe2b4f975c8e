"""Drawing with a ControlNet: whose control picture steers what, and what is told of pictures that cannot."""

import json
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from jobs.common.config import parse_config
from jobs.sample import SampleJob, take_from_picture
from pipelines.draw.config import ControlConfig, DrawConfig, SampleConfig
from pipelines.draw.control import ControlFiles, read_control
from pipelines.draw.sample import sample_identity
from pipelines.draw.sampler import Sampler
from pipelines.stages.contract import ShardOutput
from pipelines.workers.models import FoundModel
from sana_model.files.png import read_facts
from sana_model.nn.config import ControlNetConfig
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import scramble

PROMPTS = ["a red circle", "a blue square"]
CONFIG = SampleConfig(
    name="test", pipeline="zoo://pipeline", prompts=PROMPTS, draw=DrawConfig(num_steps=1, guidance_scale=1, dtype="float32")
)

PIPELINE = FoundModel("zoo://pipeline", None, "v1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet of the zoo's pipeline, and a folder of pictures: a square left or right, text in a picture's place."""
    folder = tmp_path_factory.mktemp("control")
    base = SanaTransformer.from_pretrained("zoo://pipeline/transformer").config
    config = ControlNetConfig(**{**asdict(base), "depth": 2, "form": "nvlabs"})
    scramble(SanaControlNet(config)).save_pretrained(folder / "controlnet")  # type: ignore[attr-defined]
    (folder / "pictures").mkdir()
    for name, left in (("a", 8), ("b", 36)):
        image = Image.new("RGB", (64, 64))
        ImageDraw.Draw(image).rectangle((left, 20, left + 20, 44), fill="white")
        image.save(folder / "pictures" / f"{name}.png")
    (folder / "bad.png").write_text("no picture")
    Image.new("RGB", (64, 32)).save(folder / "wide.png")
    return folder


def control_of(folder: Path, image: Any, **settings: Any) -> ControlFiles:
    config = ControlConfig(image=image, controlnet=str(folder / "controlnet"), **settings)
    return read_control(config, PROMPTS, has_size=False)


def draw(control: ControlFiles, prompts: list[str] = PROMPTS) -> ShardOutput:
    return Sampler(CONFIG, PIPELINE, None, control).process(rows_of(prompts))


def rows_of(prompts: list[str]) -> pa.Table:
    numbers = range(len(prompts))
    columns = {"id": [f"{number:06d}" for number in numbers], "prompt": prompts, "seed": [1] * len(prompts)}
    return pa.table(columns | {"number": list(numbers)})


def pixels(row: Any) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(row["image_bytes"]))).astype(int)


def test_each_prompt_is_steered_by_its_own_picture_and_says_so(folder: Path) -> None:
    paths = [str(folder / "pictures" / f"{name}.png") for name in "ab"]
    rows = draw(control_of(folder, str(folder / "pictures"), scale=0.5)).rows
    listed, swapped, unsteered = (
        draw(control_of(folder, image, scale=scale)).rows for image, scale in ((paths, 0.5), (paths[::-1], 0.5), (paths, 0.0))
    )
    assert isinstance(rows, list) and isinstance(swapped, list)
    for row, same, other, plain, path in zip(rows, listed, swapped, unsteered, paths, strict=True):
        assert (pixels(row) == pixels(same)).all()
        assert np.abs(pixels(row) - pixels(other)).max() > 5 < np.abs(pixels(row) - pixels(plain)).max()
        facts = read_facts(row["image_bytes"])
        assert facts["settings"]["control_scale"] == 0.5
        assert facts["control"] == {"image": path, "controlnet": str(folder / "controlnet")}


def test_a_drawn_picture_gives_its_control_back(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV")
    control = control_of(folder, str(folder / "pictures" / "b.png"), scale=0.7, detector="canny", canny=(50, 150))
    rows = draw(control, PROMPTS[:1]).rows
    assert isinstance(rows, list)
    (tmp_path / "x.png").write_bytes(rows[0]["image_bytes"])
    arguments = ["--dataset_uri", "d", "--sample.name", "x", "--from_picture", str(tmp_path / "x.png")]
    assert parse_config(SampleJob, take_from_picture(arguments), prog="sample", description="").sample.control == control.config


def test_a_detector_sees_the_size_that_is_drawn(folder: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    control = control_of(folder, str(folder / "pictures" / "a.png"), detector="canny")
    sampler = Sampler(replace(CONFIG, draw=replace(CONFIG.draw, height=64, width=96)), PIPELINE, None, control)
    found = np.asarray(sampler.make_control(0))
    assert found.shape == (64, 96, 3) and set(np.unique(found)) == {0, 255}
    fitted = np.asarray(Image.open(folder / "pictures" / "a.png").resize((96, 96), Image.Resampling.BICUBIC))[16:80]
    assert np.abs(found[..., 0].astype(int) - cv2.Canny(fitted, 100, 200)).mean() < 8
    sampler.process(rows_of(PROMPTS[:1]))
    with pytest.raises(ValueError, match="come together"):
        ControlConfig(image="a.png", detector="depth")


def test_a_picture_that_cannot_be_used_costs_its_prompt_alone(folder: Path) -> None:
    missing = str(folder / "absent.png")
    good = str(folder / "pictures" / "a.png")
    for image, reason in (([good, str(folder / "bad.png")], "not_an_image"), ([good, missing], "no_control_picture")):
        rows, rejects, _ = draw(control_of(folder, image))
        assert [row["id"] for row in rows] == ["000000"]
        assert [(row["id"], row["reject_reason"]) for row in rejects] == [("000001", reason)]
    changed = folder / "changing.png"
    changed.write_bytes(Path(good).read_bytes())
    control = control_of(folder, [good, str(changed)])
    changed.write_bytes((folder / "wide.png").read_bytes())
    assert [row["reject_reason"] for row in draw(control).rejects] == ["control_picture_changed"]


def test_a_table_gives_each_prompt_its_picture(folder: Path) -> None:
    rows = [
        {"prompt": "  a blue square", "control": "pictures/b.png", "depth": "wide.png"},
        {"prompt": "a green star", "control": "bad.png", "depth": ""},
        {"prompt": "a red circle", "control": str(folder / "pictures" / "a.png"), "depth": ""},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    cells = "\n".join(",".join(row.values()) for row in ({name: name for name in rows[0]}, *rows))
    (folder / "t.jsonl").write_text(lines)
    (folder / "t.csv").write_text(cells)
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        found = control_of(folder, str(folder / name))
        assert [picture.uri for picture in found.pictures] == [str(folder / "pictures" / f"{each}.png") for each in "ab"]
    depth = control_of(folder, str(folder / "t.csv"), column="depth")
    assert [picture.uri for picture in depth.pictures] == ["", str(folder / "wide.png")]
    assert [row["reject_reason"] for row in draw(depth).rejects] == ["no_control_picture"]
    (folder / "two.csv").write_text("prompt,control\na red circle,a.png\na red circle,b.png\n")
    (folder / "no.parquet").write_text("text")
    for name, column, message in [
        ("t.csv", "edges", "has the columns prompt, control, depth and no edges: see control.column"),
        ("two.csv", "control", "gives the prompt 'a red circle' two pictures, a.png and b.png"),
        ("no.parquet", "control", "no.parquet cannot be read as Parquet"),
    ]:
        with pytest.raises(ValueError, match=message):
            control_of(folder, str(folder / name), column=column)


def test_the_identity_has_what_steers_and_not_where_it_lies(folder: Path, tmp_path: Path) -> None:
    def fingerprint(image: Any, **settings: Any) -> str:
        return sample_identity(CONFIG, PROMPTS, {"pipeline": "v1"}, None, control_of(folder, image, **settings)).fingerprint

    a, b = (str(folder / "pictures" / f"{name}.png") for name in "ab")
    (tmp_path / "same.png").write_bytes(Path(a).read_bytes())
    prints = [fingerprint(a), fingerprint(b), fingerprint([a, b]), fingerprint(a, scale=0.5)]
    prints.append(sample_identity(CONFIG, PROMPTS, {"pipeline": "v1"}).fingerprint)
    assert len(set(prints)) == len(prints)
    assert fingerprint(str(tmp_path / "same.png")) == prints[0]
    assert fingerprint(a, canny=(1, 2)) == prints[0], "settings of a detector that is not used"
    other = replace(control_of(folder, a), controlnet=FoundModel("x", None, "v2"))
    assert sample_identity(CONFIG, PROMPTS, {"pipeline": "v1"}, None, other).fingerprint != prints[0]


def test_the_size_of_a_turned_picture_is_the_upright_one(folder: Path) -> None:
    turned = Image.open(folder / "wide.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.png", exif=exif)
    assert control_of(folder, str(folder / "turned.png")).pictures[0].size == (32, 64)


def test_what_does_not_fit_is_told_before_anything_is_drawn(folder: Path) -> None:
    a, wide = str(folder / "pictures" / "a.png"), str(folder / "wide.png")
    (folder / "empty").mkdir()
    (folder / "empty" / "x.txt").write_text("")
    for image, message in [
        ([a] * 3, "control.image names 3 pictures for 2 prompts"),
        ([a, wide], "pictures of 2 sizes: give draw.height and draw.width"),
        (str(folder / "bad.png"), "bad.png cannot be read as a picture: not_an_image"),
        (str(folder / "empty"), "is a folder without pictures"),
    ]:
        with pytest.raises(ValueError, match=message):
            control_of(folder, image)
    with pytest.raises(FileNotFoundError):
        control_of(folder, str(folder / "absent.png"))
    with pytest.raises(ValueError, match=r"zoo://pipeline holds no ControlNet: give control\.controlnet too"):
        Sampler(CONFIG, PIPELINE, None, replace(control_of(folder, a), controlnet=None))
