"""The paper's tables: ours are the published numbers where these follow from the model, and all are printed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure

from jobs.paper.__main__ import main
from jobs.paper.model import MACS, PARAMETERS, count_macs, count_parameters
from pipelines.evaluate.reconstruction import sharpness, ssim
from pipelines.shapes.drawing import draw_row


def run_paper(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_weights_and_multiply_accumulates_are_those_of_the_published_configurations() -> None:
    assert {name: count_parameters(name) for name in PARAMETERS} == PARAMETERS
    for name, by_size in MACS.items():
        for size, published in by_size.items():
            assert count_macs(name, size, 300) / 1e12 == pytest.approx(published, rel=4e-3)


def test_tables_of_the_models_shapes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_paper(capsys, "parameters", "--models", "[sana-0.6b,shapes]", "--autoencoders", "[]")
    assert [line.split() for line in lines[2:4]] == [
        ["sana-0.6b", "591,747,872", "591,747,872", "0"],
        ["shapes", f"{count_parameters('shapes'):,}", "-", "-"],
    ]
    lines = run_paper(capsys, "macs", "--models", "[sana-1.6b]", "--sizes", "[512]")
    assert lines[2].split() == ["sana-1.6b", "512", "px", "0.418", "0.418", "1.001"]
    lines = run_paper(capsys, "attention", "--model", "shapes", "--sizes", "[512,1024]", "--repeats", "1")
    ratios = [[word for word in line.split() if word.endswith("x") and word != "px"] for line in lines[3:5]]
    assert [row[0] for row in ratios] == ["7.8x", "31.0x"] and all(len(row) == 2 for row in ratios)


def test_the_solvers_curve_falls_and_flow_dpm_solver_s_falls_faster(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_paper(capsys, "solver", "--steps", "[4,12]", "--pictures", "3", "--reference_steps", "60")
    rows = {row[0]: row[1:] for row in (line.split() for line in lines[3:5])}
    assert rows.keys() == {"4", "12"}
    errors = {steps: [float(cell) for cell in row[:2]] for steps, row in rows.items()}
    assert errors["12"][0] < errors["4"][0] and errors["12"][1] < errors["4"][1] and errors["12"][1] < errors["12"][0]
    assert all(cell.endswith("%") for row in rows.values() for cell in row[2:])


def test_the_autoencoder_s_table_is_that_of_the_pictures_it_could_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Image.fromarray(draw_row(number)[1]).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    options = ["--pictures", str(tmp_path), "--autoencoder", "zoo://pipeline/autoencoder", "--batch_size", "2"]
    lines = run_paper(capsys, "autoencoder", *options, "--size", "64")
    assert lines[0].startswith("left out: bad.png: not_an_image") and "3 pictures of 64 px" in lines[3]
    psnr, similarity = map(float, lines[3].split()[-2:])
    assert 20 < psnr < 60 and 0.7 < similarity < 1
    assert main(["autoencoder", *options, "--size", "63"]) == 1
    assert "error: size=63 must be a multiple of 8" in capsys.readouterr().err
    assert main(["autoencoder", "--pictures", str(tmp_path / "none"), "--size", "64"]) == 1
    assert main(["macs", "--models", "[sana]"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: there is no model 'sana': choose from sana-0.6b")


def test_structural_similarity_is_that_of_torchmetrics() -> None:
    generator = np.random.default_rng(0)
    image, noise = draw_row(1)[1].astype(np.float64), generator.normal(0, 20, draw_row(1)[1].shape)
    pair = [torch.from_numpy(one).permute(2, 0, 1) for one in (image, np.clip(image + noise, 0, 255))]
    _, each = structural_similarity_index_measure(pair[1][None], pair[0][None], data_range=255.0, return_full_image=True)
    inside = each[..., 5:-5, 5:-5]  # where its windows hold nothing but the image
    assert ssim(*pair) == pytest.approx(float(inside.mean()), rel=1e-6)


def test_sharpness_falls_with_blur_and_rises_with_noise() -> None:
    image = torch.from_numpy(draw_row(1)[1]).permute(2, 0, 1)
    smooth, constant = avg_pool2d(image.float(), 3, stride=1, padding=1), torch.full_like(image, 7)
    noisy = image + 20 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    blurred, same, harder = (sharpness(image, one) for one in (smooth, image, noisy))
    assert blurred is not None and harder is not None and blurred < 0.5 < 1 < harder and same == 1
    assert sharpness(image, constant) == 0 and sharpness(constant, image) is None
