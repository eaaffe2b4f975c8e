"""Drawing: a picture depends on its prompt and seed alone; prompts come from a list or a file."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.sample import Sampler, read_prompts

DRAW = DrawConfig(num_steps=4, guidance_scale=2.5, batch_size=4, dtype="float32")
CONFIG = SampleConfig(name="test", pipeline="zoo://pipeline", prompts=["a red circle"], draw=DRAW)


def prompts_table(prompts: list[str], seeds: list[int]) -> pa.Table:
    return pa.table({"id": [f"{number:06d}" for number in range(len(prompts))], "prompt": prompts, "seed": seeds})


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch() -> None:
    prompts = ["a red circle", "a blue square", "a green star", "a red circle", "a red circle"]
    together, _, _ = Sampler(CONFIG).process(prompts_table(prompts, [1, 2, 3, 1, 4]))
    alone = Sampler(replace(CONFIG, draw=replace(DRAW, batch_size=1))).process(prompts_table(prompts[:1], [1]))[0]

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
    assert read_prompts(str(path)) == ["a red circle", "a blue star"]
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(["", " "])
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "absent.txt"))
