"""DeepSpeed, told once what we need of it: which ZeRO stage and precision, a step with clipped gradients, the float32 weights.

DeepSpeed is imported where it is used: that takes seconds, and a driver never needs it.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.optim import OptimConfig, make_optimizer

CHECKPOINT_TAG = "engine"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed spreads and computes the training.

    Args:
        zero_stage: what the workers share out among them: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.
        dtype: of weights and activations in the forward and backward pass. The weights that the optimizer updates, its
            states and the average are float32 in either case.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["bf16", "fp32"] = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


class Engine:
    """A model in training on this rank. Call it as the model; then `backward` each micro-batch and `step`.

    Needs a process group. All ranks must make the same calls.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        optim: OptimConfig,
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        device: torch.device,
    ):
        self.config = config
        self.device = device
        self.max_grad_norm = optim.max_grad_norm
        deepspeed = _import_deepspeed(device)
        # Without ZeRO and in float32 DeepSpeed clips but keeps the norm to itself: there, `step` does it.
        self._clips_itself = config.zero_stage == 0 and config.dtype == "fp32"
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": grad_accum_steps,
            "gradient_clipping": 0.0 if self._clips_itself else optim.max_grad_norm,
            "bf16": {"enabled": config.dtype == "bf16"},
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if config.dtype == "bf16" and config.zero_stage:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        model = model.to(device)
        self._deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model.parameters(), optim), config=settings
        )
        # DeepSpeed's bf16 optimizer without ZeRO begins with a step on zero gradients, which AdamW would count.
        self._deepspeed.basic_optimizer.state.clear()

    def __call__(self, latents: Tensor, timestep: Tensor, caption_embeds: Tensor, caption_mask: Tensor) -> Tensor:
        """The model's velocity, of inputs in any floating dtype."""
        dtype = self.config.torch_dtype
        return self._deepspeed(latents.to(dtype), timestep, caption_embeds.to(dtype), caption_mask)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, weighted 1 / grad_accum_steps; the last one's are averaged over the ranks."""
        self._deepspeed.backward(loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # changes no weight: DeepSpeed counts micro-batches with it

    def step(self, lr: float) -> float:
        """Update the weights; returns the norm of the gradients before clipping."""
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self._clips_itself:
            grad_norm = nn.utils.clip_grad_norm_(self._deepspeed.module.parameters(), self.max_grad_norm or float("inf"))
            self._deepspeed.step()
        else:
            self._deepspeed.step()
            grad_norm = self._deepspeed.get_global_grad_norm()
        return float(grad_norm)

    def master_weights(self) -> list[Tensor]:
        """The float32 tensors of this rank that the optimizer updates: all weights, or with ZeRO this rank's part."""
        if self.config.zero_stage == 3:
            return self._deepspeed.optimizer.fp32_partitioned_groups_flat
        return [weight for group in self._deepspeed.optimizer.param_groups for weight in group["params"]]

    def gather_weights(self) -> dict[str, Tensor] | None:
        """The model's weights in float32 on the CPU, from the master weights as they are now, on rank 0; elsewhere None."""
        from deepspeed.utils import safe_get_full_fp32_param

        masters = iter(self.master_weights())
        gathered = {}
        for name, parameter in self._deepspeed.module.named_parameters():
            if not parameter.requires_grad:  # frozen: it has no master
                full = parameter.float()
            else:
                full = next(masters) if self.config.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            if torch.distributed.get_rank() == 0:
                gathered[name] = full.detach().cpu().clone()
        return gathered or None

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer into `folder`."""
        self._deepspeed.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same world size and ZeRO stage. Raises FileNotFoundError if it is not there."""
        if not (folder / CHECKPOINT_TAG).is_dir():
            raise FileNotFoundError(f"{folder} holds no checkpoint of a training: {CHECKPOINT_TAG}/ is missing")
        self._deepspeed.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this device, quiet, and without a C++ extension that it would compile for inference on CPUs."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
