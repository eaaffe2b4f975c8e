"""Drawing: a picture depends on its prompt and seed alone; prompts come from a list or a file."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.draw import sample
from pipelines.draw.config import DrawConfig, SampleConfig, StartConfig
from pipelines.draw.prompts import read_prompt_set
from pipelines.draw.sample import run_sample, sample_identity
from pipelines.draw.sampler import Sampler
from pipelines.draw.start import read_start
from pipelines.tables.identity import Identity
from pipelines.workers.models import FoundModel
from sana_model.files.kinds import is_sprint
from sana_model.files.places import resolve
from sana_model.files.png import read_facts
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.peers import scramble

DRAW = DrawConfig(num_steps=4, guidance_scale=2.5, batch_size=4, dtype="float32")
CONFIG = SampleConfig(name="test", pipeline="zoo://pipeline", prompts=["a red circle"], draw=DRAW)


PIPELINE = FoundModel("zoo://pipeline", None, "v1")


def prompts_table(prompts: list[str], seeds: list[int]) -> pa.Table:
    numbers = list(range(len(prompts)))
    columns = {"id": [f"{number:06d}" for number in numbers], "prompt": prompts, "seed": seeds, "number": numbers}
    return pa.table(columns)


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch() -> None:
    prompts = ["a red circle", "a blue square", "a green star", "a red circle", "a red circle"]
    together, _, _ = Sampler(CONFIG, PIPELINE).process(prompts_table(prompts, [1, 2, 3, 1, 4]))
    alone = Sampler(replace(CONFIG, draw=replace(DRAW, batch_size=1)), PIPELINE).process(prompts_table(prompts[:1], [1]))[0]

    def difference(first: bytes, second: bytes) -> int:
        a, b = (np.asarray(Image.open(BytesIO(content))).astype(int) for content in (first, second))
        return int(abs(a - b).max())

    pictures = [row["image_bytes"] for row in together]
    assert difference(pictures[0], alone[0]["image_bytes"]) <= 1
    assert difference(pictures[0], pictures[3]) <= 1
    assert difference(pictures[0], pictures[4]) > 20


def test_prompts_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue star  \n")
    assert read_prompt_set(str(path)).prompts == ["a red circle", "a blue star"]
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompt_set(["", " "])
    with pytest.raises(FileNotFoundError):
        read_prompt_set(str(tmp_path / "absent.txt"))


def test_each_prompt_may_start_from_its_own_picture(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for seed in (0, 1)]
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    start = read_start(StartConfig(image=paths, strength=0.0), 2, has_size=False)
    rows = Sampler(CONFIG, PIPELINE, start).process(prompts_table(["a", "b"], [1, 2])).rows
    assert isinstance(rows, list)
    for row, picture, path in zip(rows, pictures, paths, strict=True):
        assert (np.asarray(Image.open(BytesIO(row["image_bytes"]))) == np.asarray(picture)).all()
        facts = read_facts(row["image_bytes"])
        assert facts["image"] == path and facts["model_version"] == "v1" and facts["settings"]["strength"] == 0.0


def test_the_identity_has_the_pictures_and_not_their_places(tmp_path: Path) -> None:
    def fingerprint(strength: float = 0.5, **names: object) -> str:
        config = StartConfig(strength=strength, **names)  # type: ignore[arg-type]
        return sample_identity(CONFIG, ["a", "b"], {}, read_start(config, 2, has_size=True)).fingerprint

    one, same, other = (str(tmp_path / name) for name in ("one.png", "same.png", "other.png"))
    for path, color in ((one, "red"), (same, "red"), (other, "blue")):
        Image.new("RGB", (8, 8), color).save(path)
    prints = [
        fingerprint(image=one),
        fingerprint(image=one, mask=one),
        fingerprint(image=[one, other]),
        fingerprint(image=other),
    ]
    prints += [fingerprint(0.6, image=one), sample_identity(CONFIG, ["a", "b"], {}).fingerprint]
    assert len(set(prints)) == len(prints) and fingerprint(image=same, mask=same) == prints[1]


def test_pictures_that_do_not_fit_are_told_before_anything_is_drawn(tmp_path: Path) -> None:
    small, large, text = (str(tmp_path / name) for name in ("small.png", "large.png", "x.txt"))
    Image.new("RGB", (8, 8)).save(small)
    Image.new("RGB", (16, 8)).save(large)
    Path(text).write_text("no picture")
    cases = [
        (StartConfig(image=[small] * 3), "start.image names 3 pictures for 2 prompts"),
        (StartConfig(image=small, mask=[small] * 3), "start.mask names 3 pictures for 2 prompts"),
        (StartConfig(image=[small, large]), "pictures of 2 sizes: give draw.height and draw.width"),
        (StartConfig(image=small, mask=[small, large]), "large.png is 16x8, and its picture .*small.png 8x8"),
        (StartConfig(image=text), "x.txt cannot be read as a picture: not_an_image"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            read_start(config, 2, has_size=False)
    with pytest.raises(ValueError, match="strength=2 must be from 0 to 1"):
        StartConfig(image=small, strength=2)
    with pytest.raises(FileNotFoundError):
        read_start(StartConfig(image=str(tmp_path / "absent.png")), 2, has_size=False)


def test_sprint_is_drawn_by_its_own_sampler_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)
    fields = {"depth": 2, "qk_norm": True, "cross_qk_norm": True, "guidance_embeds": True, "time_input": "unit"}
    model = TextToImage(
        scramble(SanaTransformer(replace(base.transformer.config, **fields))),  # type: ignore[arg-type]
        base.autoencoder,
        base.text_encoder,
    )
    model.save_pretrained(tmp_path / "sana")
    model.transformer.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    for name in ("x.pth", "x.safetensors"):
        model.transformer.save_pretrained(tmp_path / name, layout="nvlabs")
    assert all(is_sprint(tmp_path / name) for name in ("sana", "diffusers", "x.pth", "x.safetensors"))
    assert not is_sprint(tmp_path / "absent") and not is_sprint(resolve("zoo://pipeline"))

    made: list[tuple[Identity, Any]] = []
    monkeypatch.setattr(sample, "run_shards", lambda output, identity, shards, **call: made.append((identity, call)))
    for draw in (DrawConfig(dtype="float32"), DrawConfig(dtype="float32", num_steps=1)):
        run_sample(str(tmp_path), SampleConfig(name="x", pipeline=str(tmp_path / "sana"), prompts=["a"], draw=draw))
    (identity, call), (other, _) = made
    assert (identity.config["solver"], identity.config["num_steps"], other.config["num_steps"]) == ("scm", 2, 1)
    rows = call["make_worker"]().process(prompts_table(["a red circle"], [1])).rows
    settings = read_facts(rows[0]["image_bytes"])["settings"]
    assert (settings["solver"], settings["num_steps"]) == ("scm", 2)
    for sprints, refused, message in [
        (True, DrawConfig(solver="flow_euler"), "m is Sana-Sprint and needs draw.solver=scm, with 1 to 4 steps"),
        (True, DrawConfig(negative_prompt="bad"), "leave out draw.negative_prompt"),
        (False, DrawConfig(solver="scm"), "m is not Sana-Sprint and needs draw.solver=flow_dpm_solver or flow_euler"),
    ]:
        with pytest.raises(ValueError, match=message):
            refused.for_model("m", is_sprint=sprints)
