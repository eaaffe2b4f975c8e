"""Metrics that compare two sets of pictures: tables of features, references of every kind, and protocols of resizing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.distances import gaussian_distance, kernel_distance, precision_recall
from pipelines.evaluate.feature_config import CmmdConfig, InceptionConfig
from pipelines.evaluate.features import StoredFeatures, TableFeatures
from pipelines.evaluate.inception import Inception
from pipelines.evaluate.inception_v3 import InceptionV3, load_inception
from pipelines.evaluate.metric import iter_shards, metric_table
from pipelines.evaluate.pictures import folder_pictures, sampled_pictures
from pipelines.evaluate.registry import metric_class
from pipelines.evaluate.resizing import RESIZE
from pipelines.evaluate.run import run_metric
from pipelines.stages.contract import Progress
from pipelines.tables.identity import Identity
from pipelines.tables.schema import SAMPLES
from pipelines.tables.table import Table
from tests.pipelines.evaluate.test_distances import DRAWN, REAL, published_frechet
from tests.pipelines.evaluate.test_run import drawn_rows
from tests.support.metric_models import inception_weights


def write_features(uri: str, name: str, features: np.ndarray, *, shards: int = 1, seed: int = 0) -> Table:
    """Write a table of Inception's features in random order, in shards of uneven size."""
    table = metric_table(uri, name, "inception")
    order = np.random.default_rng(seed).permutation(len(features))
    for number, part in enumerate(np.array_split(order, shards)):
        rows = [{"id": f"{at:06d}", "prompt": "", "features": features[at]} for at in part]
        table.write_shard(f"{number:05d}", pa.Table.from_pylist(rows, table.schema))
    return table


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_figures_depend_neither_on_shards_nor_on_order(tmp_path: Path, shards: int) -> None:
    uri = str(tmp_path)
    drawn = write_features(uri, "drawn", DRAWN, shards=shards, seed=shards)
    write_features(uri, "real", REAL, shards=shards, seed=shards + 10)
    figures = Inception.summarize(drawn, InceptionConfig(reference="somewhere/real"))
    assert figures["fid"] == pytest.approx(published_frechet(REAL, DRAWN), rel=1e-6)
    assert (figures["kid"], figures["kid_std"]) == pytest.approx(kernel_distance(REAL, DRAWN), rel=1e-9)
    assert (figures["precision"], figures["recall"]) == precision_recall(REAL, DRAWN)
    few = [TableFeatures(table).sample(50) for table in (drawn, write_features(uri, "again", DRAWN, shards=3, seed=9))]
    assert few[0].shape == (50, 64) and np.array_equal(*few)


def test_stored_statistics_are_read_as_they_are(tmp_path: Path) -> None:
    drawn = write_features(str(tmp_path), "drawn", DRAWN)
    expected = published_frechet(REAL, DRAWN)
    statistics = {"mu": REAL.mean(0), "sigma": np.cov(REAL, rowvar=False)}
    np.savez(tmp_path / "pytorch_fid.npz", **statistics)
    np.savez_compressed(tmp_path / "clean_fid.npz", **statistics)
    np.savez_compressed(tmp_path / "clean_fid_kid.npz", feats=REAL)
    for name in ("pytorch_fid", "clean_fid"):
        figures = Inception.summarize(drawn, InceptionConfig(reference=f"{tmp_path}/{name}.npz"))
        assert figures == {"fid": pytest.approx(expected, rel=1e-6)}
    whole = Inception.summarize(drawn, InceptionConfig(reference=f"{tmp_path}/clean_fid_kid.npz"))
    assert whole["fid"] == pytest.approx(expected, rel=1e-6) and whole["kid"] == pytest.approx(kernel_distance(REAL, DRAWN)[0])


def bad_statistics(folder: Path) -> Iterator[tuple[str, str]]:
    (folder / "text.npz").write_text("no zip")
    yield "text.npz", "is no .npz of statistics"
    np.savez(folder / "other.npz", images=np.zeros(3))
    yield "other.npz", "holds neither mu and sigma"
    np.savez(folder / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    yield "odd.npz", r"mu is \(3,\), sigma \(2, 2\)"
    np.savez(folder / "pickle.npz", mu=np.array([{}], object), sigma=np.zeros((1, 1)))
    yield "pickle.npz", "is no .npz of statistics"
    np.savez(folder / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    yield "nan.npz", "in mu what is no finite number"
    np.savez(folder / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    yield "narrow.npz", "features of 3 numbers, the pictures of 64"


def test_statistics_and_references_that_will_not_do_are_named(tmp_path: Path) -> None:
    drawn = write_features(str(tmp_path), "drawn", DRAWN)
    for name, told in bad_statistics(tmp_path):
        with pytest.raises(ValueError, match=told):
            Inception.summarize(drawn, InceptionConfig(reference=str(tmp_path / name)))
    with pytest.raises(FileNotFoundError):
        StoredFeatures(f"{tmp_path}/none.npz").moments()
    with pytest.raises(ValueError, match=r"give evaluate\.inception\.reference"):
        Inception.reference(str(tmp_path), InceptionConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        Inception.reference(str(tmp_path), InceptionConfig(reference=f"{tmp_path}/empty"))
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="CMMD needs pictures"):
        metric_class("cmmd").summarize(drawn, CmmdConfig(reference=f"{tmp_path}/real.npz"))


class Stopped(Exception):
    """Ends a run from its callback."""


@pytest.mark.usefixtures("without_ray")
def test_a_run_that_stops_and_goes_on_gives_an_equal_table(tmp_path: Path) -> None:
    """CMMD of drawn pictures against a folder with some of the same."""
    uri = str(tmp_path / "data")
    rows, _ = drawn_rows(12)
    samples = Table(uri, "samples/night", SAMPLES)
    samples.claim(Identity("sample", {}, {}, {}))
    for number in range(4):
        samples.write_shard(f"{number:05d}", pa.Table.from_pylist(rows[3 * number : 3 * number + 3], SAMPLES))
    (tmp_path / "real/deep").mkdir(parents=True)
    for row in rows[:6]:
        (tmp_path / f"real/deep/{row['id']}.png").write_bytes(row["image_bytes"])
    config = CmmdConfig(model="zoo://clip", reference=f"{tmp_path}/real", batch_size=2)
    pictures = sampled_pictures(uri, "night")

    def stop(progress: Progress) -> None:
        if progress.done_shards:
            raise Stopped

    with pytest.raises(Stopped):
        run_metric(uri, pictures, "cmmd", config, on_progress=stop)
    table = metric_table(uri, "night", "cmmd")
    Path(table.shard_uri(table.list_shards()[-1])).unlink()  # the others may be written when the driver is told of the first
    resumed = run_metric(uri, pictures, "cmmd", config)
    whole = run_metric(str(tmp_path / "whole"), pictures, "cmmd", config)
    assert resumed.found_shards < 4 and whole.found_shards == 0
    equal = zip(iter_shards(resumed.table), iter_shards(whole.table), strict=True)
    assert all(one.equals(other) for one, other in equal)
    reference = metric_class("cmmd").reference(uri, config)
    assert reference is not None and reference.name == "real"
    real = run_metric(uri, reference, "cmmd", config)
    assert real.num_rows == 6
    expected = gaussian_distance(*(TableFeatures(table).sample(100) for table in (real.table, whole.table)))
    assert metric_class("cmmd").summarize(resumed.table, config) == {"cmmd": pytest.approx(expected, rel=1e-9)}


def test_a_folder_is_known_by_names_and_sizes(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"12345")
    first = folder_pictures("x", str(tmp_path))
    assert first.read_shard("00000")["id"].to_pylist() == ["a.png", "b.JPG"]
    (tmp_path / "b.JPG").write_bytes(b"123")
    assert folder_pictures("x", str(tmp_path)).settings != first.settings


def gradient_picture(width: int = 340, height: int = 300) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1).astype(np.uint8)
    return Image.fromarray(pixels)


PEERS = {
    "torch-fidelity": ([0.0, 0.9017392992973328, 0.6913164258003235, 0.031379614025354385], 0.3015953004360199),
    "pytorch-fid": ([0.0, 0.742020845413208, 0.65988689661026, 0.02467837929725647], 0.27112680673599243),
}
"""The first features and the mean of all 2048, as torch-fidelity 0.4.0 and pytorch-fid 0.3.0 (after torchvision's Resize(256),
CenterCrop(256), ToTensor) computed them with `inception_weights` for `gradient_picture`. Both packages need torchvision."""


def test_features_are_those_of_torch_fidelity_and_pytorch_fid() -> None:
    network = load_inception(inception_weights() | {"fc.weight": torch.zeros(1)}, "random")
    with torch.inference_mode():
        for name, (first, mean) in PEERS.items():
            features = network(RESIZE[name](gradient_picture(), 256)[None])[0]
            assert features[:4].tolist() == pytest.approx(first, rel=1e-5, abs=1e-6), name
            assert features.mean().item() == pytest.approx(mean, rel=1e-5), name


def test_clean_fid_s_resizing_is_that_of_its_package() -> None:
    """Values of clean-fid 0.1.35 (`build_resizer("clean")`, then its network's scaling), the same bit by bit. It clips: beside
    sharp edges a bicubic filter overshoots."""
    found = RESIZE["clean-fid"](gradient_picture(), 256)
    assert found[:, 150, 150].tolist() == [-0.0027727484703063965, -0.003880143165588379, -0.06091278791427612]
    assert found[2, 100, :4].tolist() == [-0.9408353567123413, 0.02199077606201172, 0.15027880668640137, -0.402069091796875]
    assert found.mean((1, 2)).tolist() == pytest.approx([-0.009765075, -0.010938309, -0.025163306], abs=1e-5)
    assert (found.min(), found.max()) == (-1, 127 / 128)


def test_weights_that_are_not_of_this_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.pth holds no weights of FID's Inception V3"):
        load_inception({"layer.weight": torch.zeros(1)}, "x.pth")
    weights = InceptionV3().state_dict()
    weights["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 1, 3, 3)
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3\.conv\.weight"):
        load_inception(weights, "x.pth")


def test_protocols_of_resizing_differ_and_stay_in_range() -> None:
    image = gradient_picture()
    found = {name: resize(image, 256) for name, resize in RESIZE.items()}
    for name, values in found.items():
        assert values.shape == (3, 299, 299) and values.dtype == torch.float32, name
        assert -1.2 < values.min() < -0.9 and 0.9 < values.max() < 1.2, name
    assert (found["clean-fid"] - found["torch-fidelity"]).abs().max() > 0.01
    plain = Image.new("RGB", (299, 299), (128, 0, 255))
    assert all(torch.allclose(resize(plain, 299)[:, 9, 9], torch.tensor([0.0, -1, 1]), atol=0.01) for resize in RESIZE.values())


def test_the_section_of_a_reference_names_its_table() -> None:
    names = {"images": "images", "s3://bucket/coco/images": "coco", "/data/mjhq/": "mjhq", "x.npz": "x.npz"}
    for reference, name in names.items():
        assert InceptionConfig(reference=reference).table_name == name
    with pytest.raises(ValueError, match="reference_name"):
        InceptionConfig(reference="data/.hidden")
    assert EvaluateConfig(name="x", metrics=("inception",)).chosen.keys() == {"inception"}
