"""Which of an autoencoder's weights are trained, and the autoencoder as a module that DeepSpeed trains."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pipelines.train_autoencoder.config import Part
from sana_model.nn.autoencoder import DCAutoencoder

PREFIXES: Mapping[Part, tuple[str, ...]] = {
    "all": ("",),
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
    "encoder.project_out": ("encoder.conv_out.",),
    "decoder.project_in": ("decoder.conv_in.",),
    "decoder.project_out": ("decoder.norm_out.", "decoder.conv_out."),
}
"""The beginnings of the names of each part's weights."""


def trained_names(names: Sequence[str], parts: Sequence[Part]) -> list[str]:
    """Those of an autoencoder's names of weights that are trained."""
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    return [name for name in names if name.startswith(prefixes)]


def describe_parts(model: nn.Module, parts: Sequence[Part]) -> str:
    """What is trained, with counts: "decoder.project_out: 3,715 of 312,250,275 weights"."""
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    trained = sum(counts[name] for name in trained_names(list(counts), parts))
    lines = [f"{part} {sum(counts[name] for name in trained_names(list(counts), [part])):,}" for part in parts]
    return f"trained parts: {', '.join(lines)}; together {trained:,} of {sum(counts.values()):,} weights"


class TrainableAutoencoder(nn.Module):
    """Encodes and decodes in one call, with gradients for the chosen parts alone.

    Its weights have the names that they have in `DCAutoencoder`. Modules without trained weights stay in evaluation mode, so
    that the statistics of frozen batch norms do not move.

    `keeps_features`: keep what the decoder's last convolution sees, for `last_gradient`.
    """

    def __init__(self, model: DCAutoencoder, parts: Sequence[Part], *, keeps_features: bool = False):
        super().__init__()
        self.config = model.config
        self.encoder, self.decoder = model.encoder, model.decoder
        trained = set(trained_names([name for name, _ in self.named_parameters()], parts))
        for name, weight in self.named_parameters():
            weight.requires_grad_(name in trained)
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)  # DeepSpeed sends weights as rows of bytes
        if keeps_features:
            self.decoder.conv_out.register_forward_pre_hook(self._keep_features)

    def forward(self, image: Tensor, keep: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoded image (B, 3, H, W) and its unscaled latents (B, C, H/f, W/f).

        Args:
            image: (B, 3, H, W) in [-1, 1].
            keep: (1, C, 1, 1), 1 for the channels of the latents that are decoded, 0 for the others.
            noise: added to the latents before they are decoded; shaped like them, or (1, 1, 1, 1) of zeros for none.
        """
        latents = self.encoder(image)
        return self.decoder((latents + noise) * keep), latents

    def train(self, mode: bool = True) -> "TrainableAutoencoder":
        super().train(mode)
        for module in self.modules():
            if not any(weight.requires_grad for weight in module.parameters()):
                module.eval()
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of both halves, in the order of the forward pass."""
        stages = [*self.encoder.stages, *reversed(self.decoder.stages)]
        return [block for stage in stages for block in stage.children()]

    def enable_gradient_checkpointing(self, every: int = 1) -> None:
        """Recompute every `every`-th block in the backward pass. Blocks with batch norms, which count each pass, are kept."""
        for index, block in enumerate(self.blocks):
            if index % every == 0 and not any(isinstance(module, nn.BatchNorm2d) for module in block.modules()):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._features = inputs[0].detach()

    def last_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the last convolution's weight in the last forward pass.

        `gradient`: of the decoded image, float32. The layer is computed anew, in float32: in float16, gradients that no loss
        scale has enlarged would be rounded to 0, and DeepSpeed does not let gradients pass through its engine's outputs twice.
        """
        last = self.decoder.conv_out
        weights = {name: weight.detach().float() for name, weight in last.named_parameters()}
        name = "weight" if "weight" in weights else "conv.weight"
        weights[name].requires_grad_()
        with torch.enable_grad():
            decoded = functional_call(last, weights, (self._features.float(),))
        return torch.autograd.grad(decoded, weights[name], gradient)[0]


def keep_first(count: int, channels: int, device: torch.device) -> Tensor:
    """The `keep` of `TrainableAutoencoder.forward` for the first `count` of so many channels."""
    return (torch.arange(channels, device=device) < count).float().view(1, -1, 1, 1)
