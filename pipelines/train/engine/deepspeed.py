"""The only file that calls DeepSpeed: ZeRO stages and precision, a step with clipped gradients, access to the float32 weights.

DeepSpeed is imported when an engine is made: the import takes seconds, and a driver never needs it.
"""

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.engine.fragments import Fragment, find_fragments
from pipelines.train.engine.optim import make_optimizer

WHOLE = "whole"
"""The layout of ZeRO 0, in which every rank holds all elements."""
LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """The model in training on this rank. Call it like the model, call `backward` for each micro-batch, then `step`.

    It needs a process group, and all ranks must make the same calls.

    Args:
        model: what is trained, on the CPU; the engine moves it to `device`. To recompute activations or to compile blocks, it
            has `enable_gradient_checkpointing` and `blocks` as `SanaTransformer` does.
        config: how DeepSpeed distributes and computes.
        optim: the optimizer; `step` is given the learning rate.
        micro_batch_size: samples of a forward pass.
        grad_accum_steps: micro-batches of a step.
        device: device to train on.
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
        # Without ZeRO and in float32 DeepSpeed does not tell the norm of the gradients, so `step` clips them itself.
        self._clips_itself = config.zero_stage == 0 and config.dtype == "fp32"
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": grad_accum_steps,
            "gradient_clipping": 0.0 if self._clips_itself else optim.max_grad_norm,
            **config.deepspeed_settings(),
        }
        model = model.to(device)
        blocks: Any = model
        if config.checkpoint_blocks:
            blocks.enable_gradient_checkpointing(config.checkpoint_blocks)
        if config.compile_blocks:
            for block in blocks.blocks:
                block.compile()
        self._deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model.parameters(), optim), config=settings
        )
        # Without ZeRO, DeepSpeed's bf16 optimizer makes a first step on zero gradients, which AdamW would count.
        self._deepspeed.basic_optimizer.state.clear()
        self.fragments = find_fragments(
            self._deepspeed.module, self._deepspeed.optimizer, self.master_weights(), zero_stage=config.zero_stage
        )
        self.shapes = {name: list(_full_shape(weight)) for name, weight in model.named_parameters() if weight.requires_grad}

    def __call__(self, *inputs: Tensor) -> Any:
        """Call the model. Floating-point inputs are turned to its dtype, but for a number for each sample (B,): timesteps."""
        dtype = self.config.torch_dtype
        return self._deepspeed(*(one.to(dtype) if one.is_floating_point() and one.ndim > 1 else one for one in inputs))

    @property
    def module(self) -> Any:
        """The model itself, on the engine's device."""
        return self._deepspeed.module

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, weighted 1 / grad_accum_steps; after the last one, average the sum over the ranks."""
        self._deepspeed.backward(loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # changes no weight, only DeepSpeed's count of micro-batches

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the model is in evaluation mode."""
        self._deepspeed.eval()
        try:
            yield
        finally:
            self._deepspeed.train()

    def step(self, lr: float) -> float:
        """Update the weights with learning rate `lr`. Returns the norm of the gradients before clipping.

        If the norm is not finite, weights and optimizer stay as they are; with fp16, the loss scale is lowered.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self._clips_itself:
            parameters = [weight for weight in self._deepspeed.module.parameters() if weight.requires_grad]
            grad_norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
            if not torch.isfinite(grad_norm):
                for weight in parameters:
                    weight.grad = None  # the optimizer skips weights without a gradient
            self._deepspeed.step()
        else:
            self._deepspeed.step()
            grad_norm = self._deepspeed.get_global_grad_norm()
        self._average_buffers()
        return float(grad_norm)

    def _gradients(self) -> list[Tensor]:
        """The gradients that `step` will apply, without ZeRO: whole, and the same on all ranks."""
        assert self.config.zero_stage == 0
        return [weight.grad for weight in self.module.parameters() if weight.grad is not None]

    def gradients_are_finite(self) -> bool:
        """Whether `step` would change the weights; to be asked after the last micro-batch. Only without ZeRO."""
        return bool(torch.stack([torch.isfinite(gradient).all() for gradient in self._gradients()]).all())

    def drop_step(self) -> None:
        """End the step and leave weights and optimizer as they are. Only without ZeRO."""
        for gradient in self._gradients():
            gradient.fill_(float("nan"))
        self.step(0.0)

    def _buffers(self) -> dict[str, Tensor]:
        """The model's stored buffers by name, such as the statistics of batch norms."""
        weights = {name for name, _ in self.module.named_parameters()}
        return {name: value for name, value in self.module.state_dict().items() if name not in weights}

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Give all ranks the same buffers, since each has seen other samples."""
        world_size = torch.distributed.get_world_size()
        for buffer in self._buffers().values() if world_size > 1 else ():
            if buffer.is_floating_point():
                shared = buffer.float()
                torch.distributed.all_reduce(shared)
                buffer.copy_(shared / world_size)

    def master_weights(self) -> list[Tensor]:
        """Return the float32 tensors that the optimizer updates: all trained weights, or with ZeRO this rank's part of them."""
        if self.config.zero_stage == 3:
            return self._deepspeed.optimizer.fp32_partitioned_groups_flat
        return [weight for group in self._deepspeed.optimizer.param_groups for weight in group["params"]]

    def gather_weights(self) -> dict[str, Tensor] | None:
        """Return all weights of the model, in float32 on the CPU, and its buffers, on rank 0; None on others. Collective call.

        Trained weights are taken from the master weights as they are now.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        masters = iter(self.master_weights())
        gathered = {}
        for name, parameter in self._deepspeed.module.named_parameters():
            if not parameter.requires_grad:  # frozen weights have no master weights
                full = parameter.float()
            else:
                full = next(masters) if self.config.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            if torch.distributed.get_rank() == 0:
                gathered[name] = full.detach().cpu().clone()
        if torch.distributed.get_rank() == 0:
            gathered |= {name: buffer.detach().cpu().clone() for name, buffer in self._buffers().items()}
        return gathered or None

    @property
    def layout(self) -> str:
        """Name of the division of weights among the ranks: with the same layout, the same rank holds the same fragments."""
        if self.config.zero_stage == 0:
            return WHOLE
        return f"ZeRO {self.config.zero_stage} {self.config.dtype} on {torch.distributed.get_world_size()}"

    @property
    def own_fragments(self) -> list[Fragment]:
        """The fragments that this rank writes to a checkpoint. Each element is among those of exactly one rank."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self.fragments[rank::world_size] if self.config.zero_stage == 0 else self.fragments

    def moments(self) -> dict[str, list[Tensor]]:
        """Return the optimizer's states that are shaped like the weights: name -> a tensor for each master tensor."""
        masters, states = self.master_weights(), self._optimizer_states()
        names = [
            name
            for name in (states[0] if states else ())
            if all(_is_like(state.get(name), master) for state, master in zip(states, masters, strict=True))
        ]
        return {name: [state[name] for state in states] for name in names}

    def other_states(self) -> dict[str, Any]:
        """Return copies on the CPU of all other states: the optimizer's for each master tensor, the loss scale, buffers."""
        moments, cpu = self.moments(), torch.device("cpu")
        states = [
            {name: _copy_to(cpu, value) for name, value in state.items() if name not in moments}
            for state in self._optimizer_states()
        ]
        buffers = {name: _copy_to(cpu, buffer) for name, buffer in self._buffers().items()}
        return {"states": states, "loss_scale": self._loss_scale_state(), "buffers": buffers}

    def prepare_states(self, moments: Sequence[str], others: Mapping[str, Any], *, layout: str) -> None:
        """Take a checkpoint's buffers and states of the optimizer, with zeros for the moments, which are then copied in.

        Args:
            moments: names of the moments.
            others: what `other_states` returned.
            layout: the layout in which `others` was written.

        Raises ValueError if `layout` is another one than this engine's and the states cannot be divided anew.
        """
        masters = self.master_weights()
        states = others["states"]
        if layout != self.layout:
            first = states[0]
            if any(isinstance(value, Tensor) and value.numel() > 1 for state in states for value in state.values()):
                raise ValueError(
                    f"this optimizer's states can only be read in the layout in which they were written, {layout}, and this "
                    f"is {self.layout}: set num_workers and engine.zero_stage as they were"
                )
            states = [{name: copy.copy(value) for name, value in first.items()} for _ in masters]
        optimizer_state = self._deepspeed.basic_optimizer.state
        optimizer_state.clear()
        for master, state in zip(masters, states, strict=True):
            values = {name: _copy_to(master.device, value) for name, value in state.items()}
            optimizer_state[master] = values | {name: torch.zeros_like(master) for name in moments}
        self._load_loss_scale(others["loss_scale"])
        for name, buffer in self._buffers().items():
            buffer.copy_(others["buffers"][name])

    def apply_master_weights(self) -> None:
        """Copy the master weights, after they were changed in place, to the weights of the forward pass. Collective call."""
        optimizer = self._deepspeed.optimizer
        if self.config.zero_stage == 3:
            for index in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.config.zero_stage:
            optimizer.update_lp_params()
        else:
            trained = [weight for weight in self._deepspeed.module.parameters() if weight.requires_grad]
            for weight, master in zip(trained, self.master_weights(), strict=True):
                weight.data.copy_(master.data)

    def _optimizer_states(self) -> list[dict[str, Any]]:
        states = self._deepspeed.basic_optimizer.state
        return [states[master] for master in self.master_weights()]

    def _loss_scale_state(self) -> dict[str, Any]:
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None) if self.config.dtype == "fp16" else None
        return {} if scaler is None else {name: getattr(scaler, name) for name in LOSS_SCALE_FIELDS}

    def _load_loss_scale(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._deepspeed.optimizer.loss_scaler, name, value)


def _full_shape(weight: Any) -> torch.Size:
    return weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape  # ZeRO 3 leaves an empty tensor in its place


def _is_like(value: object, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == master.shape


def _copy_to(device: torch.device, value: Any) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, with its log silenced, and keep it from compiling a C++ extension for CPUs."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
