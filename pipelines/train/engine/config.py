"""Configuration of the training engine: DeepSpeed, optimizer, average of the weights, adapters."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of DeepSpeed: how the training is distributed and computed.

    Args:
        zero_stage: what is divided among the workers: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.
        dtype: dtype of weights and activations in the forward and backward pass; "fp16", for GPUs without bf16, scales the
            loss. The master weights that the optimizer updates, its states and the average are float32 in any case.
        offload_optimizer: keep master weights and optimizer states in the CPU's memory, and update them there (ZeRO 1 to 3).
        offload_weights: keep each worker's part of the weights in the CPU's memory too (ZeRO 3).
        reduce_dtype: dtype in which gradients are summed over the workers; "bf16" halves the traffic and, with hundreds of
            workers, costs about a percent of their precision.
        checkpoint_blocks: recompute the activations of every n-th block in the backward pass: 1 all, 0 none.
        compile_blocks: compile each block with torch.compile; worthwhile if there are few different shapes.
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
        """Return these settings as part of DeepSpeed's own configuration."""
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
    """The moving average of the weights: pictures are drawn with it, and it is the result of the training.

    Args:
        decay: share of the average that each step keeps; 0 makes the average the weights themselves. After n steps the decay is
            min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank changes of the matrices of attention and Mix-FFN, and leave the weights themselves as they are.

    Args:
        rank: rank of each change.
        alpha: each change is multiplied by `alpha` / `rank`.
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
    """Settings of CAME (arXiv 2307.02047), by default those published with Sana.

    Its states take about 4 bytes a weight, nearly all of them for the momentum.

    Args:
        betas: decay of the momentum, of the squared gradients, and of the instability.
        eps: added to the squared gradients, and to the instability.
        factor_1x1: factor 1x1 convolutions like the matrices that they are, as NVlabs' code does. Of the transformer this is
            the patch embedding alone. False: as trainings here were before; their checkpoints have other states for it.
    """

    SINCE: ClassVar = ("factor_1x1",)

    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float] = (1e-30, 1e-16)
    factor_1x1: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and the schedule of its learning rate, which nothing scales with batch size or number of workers.

    Args:
        optimizer: "adamw"; "adamw_8bit" (states in 8 bits); or "came" or "came_8bit" (momentum in 8 bits), which need
            zero_stage=0, since the other stages do not keep the shapes of the weights.
        lr: the highest learning rate.
        betas: decay of AdamW's two moments.
        eps: added to the denominator of AdamW's update.
        came: settings of CAME in place of `betas` and `eps`.
        weight_decay: decoupled weight decay of all weights.
        max_grad_norm: gradients with a larger norm are scaled down to this norm; 0: never.
        schedule: "constant"; "cosine": falls along a cosine until the last step; "wsd": constant, then falls linearly over the
            last `decay_steps` steps.
        warmup_steps: steps over which the learning rate rises linearly.
        decay_steps: steps over which "wsd" falls.
        final_lr_share: share of `lr` that "cosine" and "wsd" fall to.
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
        """Raise ValueError if this optimizer cannot work with a ZeRO stage."""
        if self.optimizer in ("came", "came_8bit") and zero_stage:
            raise ValueError(
                f"optimizer={self.optimizer} with zero_stage={zero_stage}: CAME keeps square gradients by row and column of "
                "each matrix, and ZeRO flattens matrices into vectors, in which it would keep all of them, unfactored and "
                "without a word. Set engine.zero_stage=0 (came_8bit needs less memory there than adamw_8bit), or take adamw"
            )
