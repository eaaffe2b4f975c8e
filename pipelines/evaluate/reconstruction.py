"""How well an autoencoder gives pictures back: PSNR, SSIM, sharpness, a perceptual distance, and rFID over all of them."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pipelines.evaluate.distances import Moments, frechet_distance
from pipelines.evaluate.features import to_array
from pipelines.evaluate.metric import Metric, iter_shards
from pipelines.evaluate.reconstruction_config import ReconstructionConfig
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from torch import Tensor

WINDOW, SPREAD = 11, 1.5  # of SSIM's Gaussian window, as published
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(image: "Tensor", other: "Tensor") -> float:
    """Structural similarity of two images (3, H, W) of 0 to 255, the mean over pixels and channels (Wang et al. 2004).

    Windows lie wholly in the image. Raises ValueError if a side is shorter than the window.
    """
    import torch
    import torch.nn.functional as F

    if min(image.shape[1:]) < WINDOW:
        raise ValueError(f"an image of {image.shape[2]}x{image.shape[1]} px is smaller than SSIM's window of {WINDOW} px")
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SPREAD**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    x, y = image.double()[:, None], other.double()[:, None]
    mean_x, mean_y, square_x, square_y, product = (F.conv2d(part, window) for part in (x, y, x * x, y * y, x * y))
    covariance = product - mean_x * mean_y
    variances = square_x - mean_x**2 + square_y - mean_y**2
    found = (2 * mean_x * mean_y + C1) * (2 * covariance + C2) / ((mean_x**2 + mean_y**2 + C1) * (variances + C2))
    return found.mean().item()


def sharpness(image: "Tensor", other: "Tensor") -> float | None:
    """The high-frequency energy of `other` as a share of the image's, both (3, H, W); None if the image is flat.

    The energy is the mean square of the Laplacian of four neighbors. Below 1: blurred; above 1: noise, or edges too hard.
    """
    import torch
    import torch.nn.functional as F

    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    energy, its = (F.conv2d(one.float()[:, None], kernel).square().mean().item() for one in (image, other))
    return its / energy if energy > 0 else None


class Reconstruction(Metric[ReconstructionConfig]):
    """Encodes and decodes each picture's center square.

    Figures: `psnr` (dB), `ssim` and `sharpness` (share of the high-frequency energy) of pictures in 8 bits, means over them;
    `perceptual`; and `rfid`: `rfd` if features are not those of FID's Inception V3.
    """

    name: ClassVar = "reconstruction"
    more_models: ClassVar = ("perceptual", "inception")

    def __init__(self, config: ReconstructionConfig):
        import torch

        from pipelines.train_autoencoder.config import PerceptualConfig
        from pipelines.train_autoencoder.perceptual import FeatureDistance, load_perceptual
        from pipelines.workers.models import pick_device
        from sana_model.nn.autoencoder import DCAutoencoder

        self.config, self.device = config, pick_device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self.autoencoder = DCAutoencoder.from_pretrained(config.model, dtype=self.dtype).to(self.device).eval()
        if config.size % self.autoencoder.compression:
            raise ValueError(
                f"reconstruction.size={config.size} must be a multiple of {self.autoencoder.compression}, the factor of "
                f"{config.model}"
            )
        self.perceptual: Any = None
        if config.perceptual is not None:
            chosen = PerceptualConfig(model=config.perceptual, revision=config.perceptual_revision, kind=config.perceptual_kind)
            self.perceptual = load_perceptual(chosen).to(self.device)
        self.features: Any = None
        if config.inception is not None:
            self.features = _inception_features(config.inception, self.device)
        elif isinstance(self.perceptual, FeatureDistance):
            self.features = lambda image: self.perceptual.hidden_states(image)[-1]

    def prepare(self, row: Row) -> np.ndarray:
        from pipelines.train_autoencoder.crops import center_square

        return center_square(row["image_bytes"], self.config.size)

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        import torch

        from pipelines.extract.encode import psnr
        from pipelines.train_autoencoder.losses import to_image
        from pipelines.train_autoencoder.pictures import to_crops, to_pixels

        pictures = [row["picture"] for row in rows]
        with torch.inference_mode():
            image = to_image(to_crops(pictures), self.device)
            decoded = self.autoencoder.decode(self.autoencoder.encode(image.to(self.dtype)))
            again = to_pixels(decoded)
            seen = to_image(torch.from_numpy(again).permute(0, 3, 1, 2), self.device)  # in 8 bits, as it would be looked at
            distances = None if self.perceptual is None else self.perceptual(seen, image).tolist()
            features = None if self.features is None else [_pooled(self.features(one)) for one in (image, seen)]
        found: list[Row | RowRefused] = []
        for index, (picture, other) in enumerate(zip(pictures, again, strict=True)):
            tensors = [torch.from_numpy(np.ascontiguousarray(one)).permute(2, 0, 1) for one in (picture, other)]
            row: Row = {"psnr": psnr(picture, other), "ssim": ssim(*tensors), "sharpness": sharpness(*tensors)}
            row["perceptual"] = None if distances is None else distances[index]
            row["features"], row["features_again"] = (None, None) if features is None else [one[index] for one in features]
            found.append(row)
        return found

    @classmethod
    def summarize(cls, table: Table, config: ReconstructionConfig) -> dict[str, float]:
        names = ["psnr", "ssim", "sharpness", *(["perceptual"] if config.perceptual is not None else [])]
        values: dict[str, list[np.ndarray]] = {name: [] for name in names}
        real, drawn = Moments(), Moments()
        for shard in iter_shards(table):
            for name in names:
                values[name].append(shard[name].drop_null().to_numpy())
            for column, sums in (("features", real), ("features_again", drawn)):
                if shard.num_rows and shard[column].null_count == 0:
                    sums.add(to_array(shard, column))
        figures = {name: float(np.mean(np.concatenate(parts))) for name, parts in values.items() if sum(map(len, parts))}
        if real.count > 1:
            name = "rfd" if config.inception is None else "rfid"
            figures[name] = frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance)
        return figures

    @classmethod
    def numbers(cls) -> list[str]:
        return ["psnr", "ssim"]  # the others may be absent

    @classmethod
    def rank(cls, row: Row) -> tuple[float, ...]:
        return ()  # it judges the autoencoder, not the picture


def _inception_features(path: str, device: Any) -> Any:
    """FID's features of an image in [-1, 1], whose size is that of the crops; resized as pytorch-fid does."""
    import torch.nn.functional as F

    from pipelines.evaluate.inception_v3 import SIDE, load_inception
    from sana_model.files.places import resolve
    from sana_model.files.tensors import read_weights_file

    network = load_inception(read_weights_file(resolve(path)), path).to(device)
    return lambda image: network(F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False))


def _pooled(features: "Tensor") -> np.ndarray:
    """Features (B, D), tokens (B, N, D) or maps (B, D, h, w) as one vector a picture, (B, D)."""
    if features.ndim == 4:
        features = features.mean((2, 3))
    elif features.ndim == 3:
        features = features.mean(1)
    pooled: np.ndarray = features.float().cpu().numpy()
    return pooled
