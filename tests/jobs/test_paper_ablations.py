"""The paper's ablations on drawn scenes: designs of the block, and selections of captions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.paper.__main__ import main
from jobs.paper.ablation import DISTANCE, JUDGED, RIGHT, Estimate, PictureJudge
from jobs.paper.blocks import CAPTION_TOKENS, COSTS, DESIGNS, count_design_macs
from pipelines.evaluate.distances import Moments
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.scenes import ShapesConfig
from pipelines.train.meter import step_flops
from pipelines.workers.clip import ClipModel
from sana_model.nn.config import PRESETS

SINGLES = ShapesConfig(pair_share=0.0)


def test_operations_of_table_8_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blocks", "--num_steps", "0"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:6]
    assert len(rows) == len(COSTS)
    for row, (published, _) in zip(rows, COSTS.values(), strict=True):
        cells = re.split(r"\s{2,}", row.strip())
        assert cells[4] == f"{published:.2f}" and float(cells[5]) == pytest.approx(1, abs=0.007), row


def test_counted_operations_are_those_that_a_training_reports() -> None:
    """Of Sana's own block; the counter sees in addition 3x3 convolutions and sums over keys, which take few operations."""
    config = PRESETS["sana-0.6b"]
    counted = count_design_macs(DESIGNS["linear attention, Mix-FFN"], config, (1, 32, 32, 32), CAPTION_TOKENS)
    told = step_flops(config, batch_size=1, image_tokens=1024, caption_tokens=CAPTION_TOKENS) / 6
    assert counted == pytest.approx(told, rel=0.01)


def test_designs_differ_in_what_a_token_sees() -> None:
    """Without what attention adds, a change of one token of the latents stays there, or reaches its neighbours."""
    latents = torch.randn(1, 8, 8, 8)
    changed = latents.clone()
    changed[..., 0, 0] += 1
    reached = {}
    for name, design in DESIGNS.items():
        torch.manual_seed(0)
        model = design.make(PRESETS["tiny"])
        for block in model.blocks:
            torch.nn.init.zeros_(block.attention.proj.weight)
        with torch.inference_mode():
            caption = torch.zeros(1, 3, 64)
            pair = [model(one, torch.tensor([500.0]), caption) for one in (latents, changed)]
        reached[name] = int(((pair[0] - pair[1]).abs().amax(1) > 1e-6).sum())
    assert reached == {"softmax attention, FFN": 1, "linear attention, FFN": 1, "linear attention, Mix-FFN": 9}


def test_each_design_is_trained_and_judged_over_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures/blocks.json"
    options = "--num_steps 3 --every 2 --seeds [0,1] --num_images 8 --num_prompts 4 --solver_steps 1 --micro_batch_size 2"
    assert main(["blocks", *options.split(), "--output", str(output)]) == 0
    curves = json.loads(output.read_text())
    assert list(curves) == list(DESIGNS)
    for points in curves.values():
        assert list(points) == ["2", "3"]
        for seeds in points.values():
            assert [set(figures) for figures in seeds] == [{*JUDGED, RIGHT, DISTANCE}] * 2
    shown = capsys.readouterr().out
    assert "18.7" in shown and shown.count("±") > 10
    with pytest.raises(SystemExit):
        main(["blocks", "--seeds", "[1,1]"])
    assert "seeds=[1, 1] must be one or more, each of them once" in capsys.readouterr().err


def test_pictures_of_what_is_asked_are_right_and_near() -> None:
    clip = ClipModel("zoo://clip")
    drawn = [draw_row(at, SINGLES) for at in range(120)]
    images = [Image.fromarray(pixels) for _, pixels in drawn]
    scenes = [scene for scene, _ in drawn]
    judge = PictureJudge(clip, Moments().add(clip.embed_images(images[:60]).numpy()))
    good = judge.judge(scenes[60:], images[60:])
    shuffled = judge.judge(scenes[60:], images[61:] + images[60:61])
    blank = judge.judge(scenes[60:], [Image.new("RGB", (64, 64), (at, at, at)) for at in range(60)])
    assert good[RIGHT] > 0.9 and shuffled[RIGHT] < 0.1
    assert shuffled[DISTANCE] == pytest.approx(good[DISTANCE]) and good[DISTANCE] < blank[DISTANCE] / 3


def test_intervals_are_student_s() -> None:
    values = [0.2, 0.4, 0.9]
    estimate = Estimate.over(values)
    assert estimate.mean == pytest.approx(0.5)
    assert estimate.half == pytest.approx(4.30265 * np.std(values, ddof=1) / 3**0.5, rel=1e-5)
    assert estimate.text(".1f", 100) == "50.0 ± 89.6"
    assert Estimate.over([0.25]).text(".2f") == "0.25"
