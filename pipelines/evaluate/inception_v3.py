"""Inception V3 as it is used for FID: the network of TensorFlow's `inception-2015-12-05`, whose weights pytorch-fid and
torch-fidelity distribute under these names. It differs from torchvision's in its average and maximum pools (marked below)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048
SIDE = 299  # pixels of the input


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, padding: int | tuple[int, int] = 0
    ):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """Average pool of 3x3, which counts no padding: TensorFlow's."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35: branches of 1x1, 5x5, two 3x3, and a pool."""

    def __init__(self, channels: int, pool: int):
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17: branches of 1x1, 7x7 (as 1x7 and 7x1), two of these, and a pool."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        row, beside = (1, 7), (0, 3)  # a kernel and its padding
        column, above = (7, 1), (3, 0)
        self.branch1x1 = Convolution(channels, 192, 1)
        self.branch7x7_1 = Convolution(channels, inner, 1)
        self.branch7x7_2 = Convolution(inner, inner, row, padding=beside)
        self.branch7x7_3 = Convolution(inner, 192, column, padding=above)
        self.branch7x7dbl_1 = Convolution(channels, inner, 1)
        self.branch7x7dbl_2 = Convolution(inner, inner, column, padding=above)
        self.branch7x7dbl_3 = Convolution(inner, inner, row, padding=beside)
        self.branch7x7dbl_4 = Convolution(inner, inner, column, padding=above)
        self.branch7x7dbl_5 = Convolution(inner, 192, row, padding=beside)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8. The last of the two has a maximum pool where one expects an average: so it is in TensorFlow's file."""

    def __init__(self, channels: int, *, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        return torch.cat([*parts, self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """Pictures (B, 3, 299, 299) with values from -1 to 1 -> features of the last pool (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images))), 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def load_inception(weights: Mapping[str, Tensor], source: str) -> InceptionV3:
    """The network with weights of pytorch-fid's or torch-fidelity's file. Raises ValueError, naming `source`, for others."""
    kept = {name: weight for name, weight in weights.items() if not name.startswith("fc.")}  # the classifier
    network = InceptionV3()
    expected = network.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    absent = expected.keys() - kept.keys() - optional
    unknown = kept.keys() - expected.keys()
    shapes = [name for name in expected.keys() & kept.keys() if expected[name].shape != kept[name].shape]
    if odd := sorted(absent) + sorted(unknown) + shapes:
        raise ValueError(
            f"{source} holds no weights of FID's Inception V3: {odd[0]} is absent, unknown or of another shape; take "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity"
        )
    network.load_state_dict(kept, strict=False)
    return network.eval().requires_grad_(False)
