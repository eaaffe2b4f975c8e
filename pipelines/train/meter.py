"""Measurements of the transformer's training: losses by noise level, tokens, and the FLOPs of a step, of which the share of
the device's peak (MFU) follows.
"""

from functools import cache

import torch
from torch import Tensor

from pipelines.train.loop.meter import StepMeter
from sana_model.flow import loss_by_sigma
from sana_model.nn.config import LINEAR_HEAD_DIM, SanaConfig
from sana_model.nn.transformer import SanaTransformer

NUM_SIGMA_BINS = 5


class TrainingMeter(StepMeter):
    """Measures losses by noise level, and tokens, too."""

    def _clear(self) -> None:
        super()._clear()
        self._step_sigmas: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._sigmas: list[Tensor] = []
        self._num_tokens = 0

    def add(self, loss: Tensor, sigma: Tensor, *, num_tokens: int, flops: float) -> None:
        """Add a micro-batch: loss (B,), noise levels (B,), number of its image tokens, and FLOPs to compute it."""
        self.add_losses(loss, flops=flops)
        self._step_sigmas.append(sigma)
        self._num_tokens += num_tokens

    def end_step(self, *, lr: float, grad_norm: float) -> None:
        self._losses += self.step_losses
        self._sigmas += self._step_sigmas
        self._step_sigmas = []
        super().end_step(lr=lr, grad_norm=grad_norm)

    def drop_step(self) -> None:
        super().drop_step()
        self._step_sigmas = []

    def _measure_more(self, seconds: float) -> dict[str, float]:
        """Tokens, and the mean loss by range of noise levels, for ranges in which there are samples."""
        mean, count = loss_by_sigma(torch.cat(self._losses), torch.cat(self._sigmas), num_bins=NUM_SIGMA_BINS)
        total = torch.where(count > 0, mean * count, 0)
        total, count = self._sum_over_ranks(torch.cat([total, count.to(total)])).chunk(2)
        edges = [bin_index / NUM_SIGMA_BINS for bin_index in range(NUM_SIGMA_BINS + 1)]
        by_sigma = {
            f"loss_sigma.{edges[index]:.1f}-{edges[index + 1]:.1f}": (total[index] / count[index]).item()
            for index in range(NUM_SIGMA_BINS)
            if count[index] > 0
        }
        return {"tokens_per_second": torch.distributed.get_world_size() * self._num_tokens / seconds, **by_sigma}


def step_flops(config: SanaConfig, *, batch_size: int, image_tokens: int, caption_tokens: int, adapters: bool = False) -> float:
    """Return the FLOPs of a forward and a backward pass, without what gradient checkpointing recomputes.

    Args:
        config: the transformer.
        batch_size: number of samples.
        image_tokens: image tokens of a sample.
        caption_tokens: caption tokens of a sample.
        adapters: only adapters are trained, so the frozen weights need no gradients. The adapters' own FLOPs are not counted.
    """
    by_image, by_caption, by_sample = _weights_by_use(config)
    matmuls = by_image * image_tokens + by_caption * caption_tokens + by_sample
    attention = 2 * config.depth * config.dim * image_tokens * (LINEAR_HEAD_DIM + caption_tokens)
    return 2.0 * batch_size * ((2 if adapters else 3) * matmuls + 3 * attention)


@cache
def _weights_by_use(config: SanaConfig) -> tuple[int, int, int]:
    """Return the numbers of weights that multiply each image token, each caption token, and each sample's time input."""
    with torch.device("meta"):
        model = SanaTransformer(config)
    counts = {"image": 0, "caption": 0, "sample": 0}
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            caption = name.startswith("caption_proj") or "key_value" in name
            counts["caption" if caption else "sample" if name.startswith("time_embed") else "image"] += weight.numel()
    return counts["image"], counts["caption"], counts["sample"]
