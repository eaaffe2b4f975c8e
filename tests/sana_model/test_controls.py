"""Control pictures: edges, depth and outlines of pictures whose content is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from sana_model.controls import CannyDetector, DepthDetector, Detector, OutlineDetector
from sana_model.nn.hed import HedNetwork


@pytest.fixture(scope="module")
def square() -> Image.Image:
    """A white square on black, from 30 to 69."""
    image = Image.new("RGB", (112, 96))
    ImageDraw.Draw(image).rectangle((30, 30, 69, 69), fill="white")
    return image


@pytest.fixture(scope="module")
def hed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HED's weights file in which the first two stages sum up differences of neighbours, so that it finds outlines."""
    network = HedNetwork()
    for parameter in network.parameters():
        parameter.data.zero_()
    # Right minus left, below minus above, and back: relu keeps one sign of each.
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    for channel, kernel in enumerate((sobel, -sobel, sobel.T, -sobel.T)):
        network.block1.convs[0].weight.data[channel, 0] = kernel
        network.block1.convs[1].weight.data[channel, channel, 1, 1] = 1
    network.block1.projection.weight.data[0, :4] = 1 / 4
    network.block1.projection.bias.data[:] = -15
    path = tmp_path_factory.mktemp("hed") / "ControlNetHED.pth"
    torch.save(network.state_dict(), path)
    return path


def outline(image: Image.Image, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """The values within `margin` pixels of the square's outline, and those farther away."""
    y, x = np.mgrid[: image.height, : image.width]
    inside = np.maximum(np.abs(x - 49.5), np.abs(y - 49.5))
    near = np.abs(inside - 20) <= margin
    values = np.asarray(image)
    assert (values[..., 0] == values[..., 1]).all() and (values[..., 1] == values[..., 2]).all()
    return values[near, 0], values[~near, 0]


def check_outline(detector: Detector, square: Image.Image, margin: int) -> np.ndarray:
    found = detector(square)
    assert found.mode == "RGB" and found.size == square.size
    near, far = outline(found, margin)
    assert far.max() < 64 and near.max() > 200
    return near


def test_canny_draws_the_outline(square: Image.Image) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    near = check_outline(CannyDetector(), square, 2)
    assert set(near.tolist()) == {0, 255}
    assert (np.asarray(CannyDetector(50, 90)(square))[..., 0] == cv2.Canny(np.asarray(square), 50, 90)).all()
    faint = Image.fromarray((np.asarray(square) // 8).astype(np.uint8))
    assert np.asarray(CannyDetector()(faint)).max() == 0 < np.asarray(CannyDetector(10, 20)(faint)).max()


def test_outlines_are_soft_lines_or_scribbles_of_one_width(square: Image.Image, hed: Path) -> None:
    blurred = square.filter(ImageFilter.GaussianBlur(4))
    soft = check_outline(OutlineDetector(hed), blurred, 16)
    assert len(set(soft.tolist())) > 10
    pytest.importorskip("cv2", reason="needs OpenCV")
    lines = [check_outline(OutlineDetector(hed, thickness=thickness), blurred, 16) for thickness in (0, 2, 12)]
    assert [set(line.tolist()) for line in lines] == [{0, 255}] * 3
    assert 0 < lines[0].mean() < lines[1].mean() < lines[2].mean()


def test_weights_of_something_else_and_bad_settings_are_told(tmp_path: Path, hed: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth holds no weights of HED"):
        OutlineDetector(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="thickness=-1 must be 0 or more"):
        OutlineDetector(hed, thickness=-1)


def test_depth_is_that_of_the_model_white_where_it_is_near(tmp_path: Path, square: Image.Image) -> None:
    config = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DPTForDepthEstimation(config).eval()
    model.save_pretrained(tmp_path)
    processor = DPTImageProcessorPil(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        predicted = model(**processor(images=[square], return_tensors="pt")).predicted_depth
    depth = torch.nn.functional.interpolate(predicted[:, None], (96, 112), mode="bicubic")[0, 0].numpy()
    wanted = (depth - depth.min()) / (depth.max() - depth.min()) * 255
    for detector, expected in ((DepthDetector(tmp_path), wanted), (DepthDetector(tmp_path, gives_distance=True), 255 - wanted)):
        found = detector(square)
        assert found.mode == "RGB" and found.size == square.size
        assert np.abs(np.asarray(found)[..., 0] - expected).max() <= 1 and np.asarray(found).std() > 10
