"""Configuration of the training engine: DeepSpeed, optimizer, average of the weights, adapters."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed spreads and computes the training.

    Args:
        zero_stage: what the workers share out among them: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.
        dtype: of weights and activations in the forward and backward pass; "fp16", for GPUs without bf16, scales the loss.
            The weights that the optimizer updates, its states and the average are float32 in either case.
        offload_optimizer: keep master weights and optimizer states in the CPU's memory, and update them there (ZeRO 1 to 3).
        offload_weights: keep each worker's part of the weights there too (ZeRO 3).
        reduce_dtype: in which gradients are summed over the workers; "bf16" halves what goes over the network, and costs about
            a percent of their precision with hundreds of workers.
        checkpoint_blocks: recompute every n-th block's activations in the backward pass: 1 all, 0 none.
        compile_blocks: let torch.compile make each block one program; pays where shapes are few.
    """

    NO_VALUE: ClassVar = (
        "zero_stage",
        "reduce_dtype",
        "offload_optimizer",
        "offload_weights",
        "checkpoint_blocks",
        "compile_blocks",
    )

    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    offload_optimizer: bool = False
    offload_weights: bool = False
    checkpoint_blocks: int = 0
    compile_blocks: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint_blocks < 0:
            raise ValueError(f"checkpoint_blocks={self.checkpoint_blocks} must not be negative")
        if self.reduce_dtype == "bf16" and self.dtype != "bf16":
            raise ValueError(f"reduce_dtype=bf16 with dtype={self.dtype}: sum gradients in fp32 there")
        if self.dtype == "fp16" and self.zero_stage == 0:
            raise ValueError("dtype=fp16 with zero_stage=0: take zero_stage=1, which costs one worker nothing, or bf16")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer with zero_stage=0: DeepSpeed offloads from zero_stage=1 on")
        if self.offload_weights and self.zero_stage != 3:
            raise ValueError(f"offload_weights with zero_stage={self.zero_stage}: only zero_stage=3 cuts the weights")

    @property
    def torch_dtype(self) -> Any:
        """The `torch.dtype` of `dtype`."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype]

    def deepspeed_settings(self) -> dict[str, Any]:
        """What DeepSpeed is told of it."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_weights:
            zero["offload_param"] = {"device": "cpu"}
        settings: dict[str, Any] = {
            "bf16": {"enabled": self.dtype == "bf16"},
            "fp16": {"enabled": self.dtype == "fp16"},
            "zero_optimization": zero,
            "communication_data_type": self.reduce_dtype,
            "zero_allow_untested_optimizer": True,  # 8-bit AdamW
            "zero_force_ds_cpu_optimizer": False,  # its own would compile a C++ extension; torch's fused AdamW is as good
            "steps_per_print": None,
        }
        if self.dtype != "fp32" and self.zero_stage:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average that pictures are drawn with, and that a training ends in.

    Args:
        decay: the share of the average that each step keeps; 0: the average is the weights themselves. After the first n steps
            it is min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank changes of the matrices of attention and Mix-FFN, and leave all other weights as they are.

    Args:
        rank: of each change; `alpha` / `rank` is its weight.
        alpha: see `rank`.
    """

    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: both must be positive")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class CameConfig:
    """CAME (arXiv 2307.02047), as Sana is published with it. Its momentum takes 4 bytes a weight, the rest next to none.

    Args:
        betas: of the momentum, of the square gradients, and of the instability.
        eps: added to the square gradients, and to the instability.
    """

    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float] = (1e-30, 1e-16)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimizer and its schedule. The learning rate is what is written here: nothing scales it with batch or workers.

    Args:
        optimizer: "adamw", "adamw_8bit" (states in 8 bits), or, at ZeRO stage 0, which alone leaves the weights their shapes,
            "came" or "came_8bit" (its momentum in 8 bits).
        lr: the highest learning rate.
        betas: of AdamW.
        eps: of AdamW.
        came: what CAME has in their place.
        weight_decay: for all weights.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0: never.
        schedule: "constant"; "cosine" down to `final_lr_share` at the last step; or "wsd": constant, and then down to it in a
            straight line over the last `decay_steps`.
        warmup_steps: steps of linear rise.
        decay_steps: of "wsd".
        final_lr_share: of `lr`, where "cosine" and "wsd" end.
    """

    optimizer: Literal["adamw", "adamw_8bit", "came", "came_8bit"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    came: CameConfig = field(default_factory=CameConfig)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr_share: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"schedule={self.schedule} with decay_steps={self.decay_steps}: only wsd reads them, and needs them"
            )

    def check_sharding(self, zero_stage: int) -> None:
        """Raises ValueError if this optimizer cannot work on what a ZeRO stage makes of the weights."""
        if self.optimizer in ("came", "came_8bit") and zero_stage:
            raise ValueError(
                f"optimizer={self.optimizer} with zero_stage={zero_stage}: CAME keeps square gradients by row and column of "
                "each matrix, and ZeRO flattens matrices into vectors, in which it would keep all of them, unfactored and "
                "without a word. Set engine.zero_stage=0 (came_8bit needs less memory there than adamw_8bit), or take adamw"
            )
