"""How much a training step computes, and how much a GPU could: their ratio is the model FLOPs utilization (MFU)."""

from functools import cache

import torch

from sana_model.transformer import SanaConfig, SanaTransformer

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
}
"""Dense, with 16-bit inputs, as the makers publish them, by a part of the device's name; the first that fits counts."""

LINEAR_HEAD_DIM = 32


def peak_flops(device: torch.device) -> float | None:
    """None for a CPU, or a GPU that is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def step_flops(config: SanaConfig, *, batch_size: int, image_tokens: int, caption_tokens: int, adapters: bool = False) -> float:
    """Of a forward and a backward pass; what checkpointing recomputes is not counted.

    Args:
        image_tokens, caption_tokens: of one sample.
        adapters: only they are trained: frozen weights get no gradients. What the adapters compute is not counted.
    """
    by_image, by_caption, by_sample = _weights_by_use(config)
    matmuls = by_image * image_tokens + by_caption * caption_tokens + by_sample
    attention = 2 * config.depth * config.dim * image_tokens * (LINEAR_HEAD_DIM + caption_tokens)
    return 2.0 * batch_size * ((2 if adapters else 3) * matmuls + 3 * attention)


@cache
def _weights_by_use(config: SanaConfig) -> tuple[int, int, int]:
    """Numbers of weights that multiply each image token, each caption token, and each sample's time input."""
    with torch.device("meta"):
        model = SanaTransformer(config)
    counts = {"image": 0, "caption": 0, "sample": 0}
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            caption = name.startswith("caption_proj") or "key_value" in name
            counts["caption" if caption else "sample" if name.startswith("time_embed") else "image"] += weight.numel()
    return counts["image"], counts["caption"], counts["sample"]
