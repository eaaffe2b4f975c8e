"""Matrices of 8-bit and 4-bit numbers: how they are made of a weight, and products with them.

Every scheme is symmetric: a number times its scale is the weight. W8A8 is that of Sana (section 4, "on-device deployment"): a
scale for each token of the activations and for each row of the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
"""Weights of a row that share a scale in 4 bits: the widths of all published models divide by it."""
LARGEST_INT8, LARGEST_FP8 = 127.0, 448.0
HOPPER = (9, 0)
"""The compute capability from which on GPUs multiply 8-bit floats with a scale for each row."""
HAS_VNNI = torch.cpu._is_vnni_supported()
"""Whether this CPU adds products of 8-bit numbers in 32 bits (AVX-512 VNNI). Others add pairs of them in 16 bits first, which
saturate."""
EXACT_WIDTH = 2**24 // 127**2
"""So many products of 8-bit numbers have a sum that float32 holds exactly."""


def quantize_rows(values: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scale each row of (rows, in) to values of at most `largest`: float32 (rows, in), and scales (rows, 1) of the old dtype.

    A row of zeros gets the scale 1, and a row with a NaN the scale NaN, so that what is made of it is NaN too.
    """
    peak = values.abs().amax(dim=-1, keepdim=True).float() / largest
    scale = torch.where(peak == 0, 1.0, peak).to(values.dtype)
    scale = torch.where(scale == 0, torch.finfo(values.dtype).tiny, scale)  # a row of very small float16 numbers
    return (values.float() / scale.float()).clamp_(-largest, largest), scale


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) to int8 (out, in), and scales (out, 1) of the weight's dtype."""
    scaled, scale = quantize_rows(weight, LARGEST_INT8)
    return scaled.round_().to(torch.int8), scale


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) to float8_e4m3fn (out, in) seen as uint8, and scales (out, 1) of the weight's dtype."""
    scaled, scale = quantize_rows(weight, LARGEST_FP8)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) to pairs of 4-bit numbers, uint8 (out, groups * 16), and scales (out, groups) of the weight's dtype.

    In each group the number that is farthest from 0 becomes -8, so that all 16 values are used. A byte holds number i of its
    group in the low half, and number i + 16 in the high half. A last group that is not full is filled with zeros.
    """
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).float()  # (out, groups, GROUP)
    extreme = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))
    scale = torch.where(extreme != 0, extreme / -8, 1.0).to(weight.dtype)
    scale = torch.where(scale != 0, scale, torch.finfo(weight.dtype).tiny)
    numbers = ((padded / scale.float()).round_().clamp_(-8, 7) + 8).to(torch.uint8)
    low, high = numbers.chunk(2, dim=2)
    return (low | (high << 4)).flatten(1), scale.squeeze(2)


def from_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight (out, in) that `to_int8` made, in the dtype of `scale`."""
    return weight.to(scale.dtype).mul_(scale)


def from_int4(weight: Tensor, scale: Tensor, width: int) -> Tensor:
    """The weight (out, width) that `to_int4` made, in the dtype of `scale`."""
    pairs = weight.unflatten(1, (-1, GROUP // 2))
    numbers = torch.cat([pairs & 15, pairs >> 4], dim=2).to(scale.dtype)
    return numbers.sub_(8).mul_(scale.unsqueeze(2)).flatten(1)[:, :width]


def from_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight (out, in) that `to_fp8` made, in the dtype of `scale`."""
    return weight.view(torch.float8_e4m3fn).to(scale.dtype).mul_(scale)


def w8a8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) times int8 (out, in) with scales (out, 1): (..., out), of x's dtype. The tokens of x are quantized here.

    The products and sums are whole numbers, and exact: on a CPU without AVX-512 VNNI they are computed in float32, in parts,
    which takes longer. Where the device has no such product, `w8a8_reference` gives the same.
    """
    tokens = x.flatten(0, -2)
    scaled, token_scale = quantize_rows(tokens, LARGEST_INT8)
    numbers = scaled.round_()
    if x.device.type == "cpu" and _has_onednn():
        product = _onednn_product(numbers, weight, scale, x.dtype)
        product = product.mul_(token_scale.to(product.dtype))
    else:
        sums = _float_mm(numbers, weight) if x.device.type == "cpu" and not HAS_VNNI else _int_mm(numbers, weight)
        product = sums.float().mul_(token_scale.float()).mul_(scale.float().t())
    product = product if bias is None else product.add_(bias)
    return product.to(x.dtype).unflatten(0, x.shape[:-1])


def w8a8_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The plain form of `w8a8_linear`, in float64. Tests compare the two."""
    scaled, token_scale = quantize_rows(x.flatten(0, -2), LARGEST_INT8)
    product = scaled.round().double() @ weight.double().t() * token_scale.double() * scale.double().t()
    product = product if bias is None else product + bias
    return product.to(x.dtype).unflatten(0, x.shape[:-1])


def _has_onednn() -> bool:
    allowed = HAS_VNNI and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(allowed) and not torch.compiler.is_compiling()  # torch.compile chooses its own kernels


def _onednn_product(numbers: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole `numbers` (tokens, in) times int8 (out, in) times scales (out, 1), in bfloat16 or float32: one call of oneDNN.

    The numbers go in as uint8 with the zero point 128, which AVX-512 VNNI multiplies (CPUs without it would saturate); with
    int8, torch 2.13 crashed on an EPYC. float16 would overflow before the tokens' scales come in.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, list(numbers.shape))  # a percent of the product's time; no copy is kept
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    out = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    shifted = numbers.add_(128).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scale.float().flatten(), zeros, None, 1.0, 0, out, "none", [], ""
    )


def _float_mm(numbers: Tensor, weight: Tensor) -> Tensor:
    """What `_int_mm` gives, by products in float32 of parts whose sums are exact."""
    sums = torch.zeros(len(numbers), len(weight), dtype=torch.int32, device=numbers.device)
    for part, rows in zip(numbers.split(EXACT_WIDTH, 1), weight.split(EXACT_WIDTH, 1), strict=True):
        sums += (part @ rows.float().t()).to(torch.int32)
    return sums


def _int_mm(numbers: Tensor, weight: Tensor) -> Tensor:
    """Whole `numbers` (tokens, in) times int8 (out, in): (tokens, out) int32.

    cuBLAS takes at least 17 tokens, and widths that divide by 8.
    """
    count, width = numbers.shape
    padded = F.pad(numbers, (0, -width % 8, 0, max(17 - count, 0))).to(torch.int8)
    if width % 8 or len(weight) % 8:
        return torch._int_mm(padded, F.pad(weight, (0, -width % 8, 0, -len(weight) % 8)).t())[:count, : len(weight)]
    return torch._int_mm(padded, weight.t())[:count]


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) times float8 (out, in), seen as uint8, with scales (out, 1): (..., out), of x's dtype, bfloat16 best.

    Raises ValueError on a device that cannot (`check_fp8`).
    """
    check_fp8(x.device)
    scaled, token_scale = quantize_rows(x.flatten(0, -2), LARGEST_FP8)
    product = torch._scaled_mm(
        scaled.to(torch.float8_e4m3fn),
        weight.view(torch.float8_e4m3fn).t(),
        scale_a=token_scale.float(),
        scale_b=scale.float().t().contiguous(),
        out_dtype=torch.bfloat16,
    ).to(x.dtype)
    return (product if bias is None else product.add_(bias)).unflatten(0, x.shape[:-1])


def check_fp8(device: torch.device) -> None:
    """Raise ValueError unless `device` is an NVIDIA GPU of Hopper or newer."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= HOPPER:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
    raise ValueError(f"precision=fp8 needs an NVIDIA GPU of Hopper (H100) or newer, not {name}: take w8a8, int8 or int4")
