"""Estimate of the memory that a training takes on each device, by part, without using any device.

Activations are counted while the real model's forward and backward pass run on fake tensors, which have shapes but no values.
What DeepSpeed holds is computed by rules that were found by watching it at work, for each ZeRO stage.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.engine.lora import add_lora
from pipelines.train.loop.config import LoopConfig
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AutoencoderConfig, SanaConfig
from sana_model.nn.text_encoder import MAX_FORWARD_TOKENS
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import CaptionTokens
from sana_model.pictures import MAX_DECODE_PIXELS

BUCKET = 500_000_000
"""Gradient elements that DeepSpeed collects before it sends them, from ZeRO 2 on (its default `reduce_bucket_size`)."""
LIVE_WEIGHTS = 1_000_000_000
"""Elements of gathered weights that ZeRO 3 keeps at most (DeepSpeed's default `stage3_max_live_parameters`)."""
CONTEXT_BYTES = 2**30
"""A guess at the bytes that driver, cuBLAS and NCCL take on a GPU."""


class LiveBytes(TorchDispatchMode):
    """Within, counts the bytes of all tensors that operations make and that are still alive.

    live: bytes alive now. peak: the most that were alive at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Do not count these tensors: they existed before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors.values()}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Numbers of weights of each model. `trained`: those weights of the transformer that are trained.

    A model that takes no memory on the training's device counts 0.
    """

    transformer: int
    trained: int
    text_encoder: int
    autoencoder: int


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The size of a micro-batch.

    samples: its number of samples. height, width: of the latents. caption_tokens: tokens of each caption, without padding.
    """

    samples: int
    height: int
    width: int
    caption_tokens: int


@contextmanager
def fake_transformer(config: SanaConfig, training: TrainConfig) -> Iterator[SanaTransformer]:
    """Make the transformer as it is trained, with its adapters, of fake weights; tensors made within are fake too."""
    with torch.device("meta"):
        model = SanaTransformer(config)
        if training.lora is not None:
            add_lora(model, training.lora, seed=0)
    model.enable_gradient_checkpointing(training.engine.checkpoint_blocks)
    with FakeTensorMode():
        make_fake(model, training.engine.torch_dtype)
        yield model.train()


def make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace weights and buffers on the meta device by fake ones of this dtype, which `Module.to` cannot do."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=weight.requires_grad)
            module.register_parameter(name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype))


def count_weights(model: nn.Module) -> tuple[int, int]:
    """Return the number of all weights, and of those that are trained."""
    weights = list(model.parameters())
    return sum(weight.numel() for weight in weights), sum(weight.numel() for weight in weights if weight.requires_grad)


def count_activations(model: SanaTransformer, shape: StepShape, dtype: torch.dtype) -> int:
    """Return the bytes at the peak of a micro-batch's forward and backward pass, without weights and their gradients.

    Args:
        model: the transformer, from `fake_transformer`.
        shape: the micro-batch, all of whose captions are taken to have `caption_tokens` tokens.
        dtype: dtype of weights and activations.
    """
    config = model.config
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(forget_gradient)
    counter = LiveBytes()
    counter.leave_out(dict(model.named_parameters()))
    with counter:
        latents = torch.empty(shape.samples, config.in_channels, shape.height, shape.width, dtype=torch.float32)
        noise, noisy = torch.empty_like(latents), torch.empty_like(latents, dtype=dtype)
        timestep = torch.empty(shape.samples, dtype=torch.float32)
        num_tokens = shape.samples * shape.caption_tokens
        embeds = torch.empty(num_tokens, config.caption_dim, dtype=dtype)
        # Captions of unequal length need a mask, so count one.
        mask = torch.ones(shape.samples, 1, 1, shape.caption_tokens, dtype=torch.bool)
        positions = torch.arange(num_tokens)
        captions = CaptionTokens(model.caption_proj(embeds), positions, mask, shape.samples, shape.caption_tokens)
        velocity = model(noisy, timestep, captions)
        (velocity.float() - (noise - latents)).square().flatten(1).mean(1).mean().backward()
    return counter.peak


def forget_gradient(weight: Tensor) -> None:
    weight.grad = None


def count_text_activations(config: Any, samples: int, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes at the peak of the text encoder's forward pass, without its weights.

    Args:
        config: transformers' configuration of the text encoder, a decoder-only model.
        samples: number of captions.
        tokens: tokens of each caption.
        dtype: dtype of weights and activations.
    """
    from transformers import AutoModel

    with FakeTensorMode():
        model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=False).eval()
        rows = min(samples, max(MAX_FORWARD_TOKENS // tokens, 1))
        counter = LiveBytes()
        counter.leave_out(dict(model.named_parameters()) | dict(model.named_buffers()))
        with torch.no_grad(), counter:
            model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    return counter.peak


def count_decoding(config: AutoencoderConfig, pictures: int, size: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes at the peak of decoding a grid's pictures as `TextToImage` does it, without the weights.

    Args:
        config: the autoencoder.
        pictures: number of pictures of the grid.
        size: height and width of a picture in pixels.
        dtype: dtype of weights and activations.
    """
    height, width = size
    at_once = min(pictures, max(MAX_DECODE_PIXELS // (height * width), 1))
    with torch.device("meta"):
        model = DCAutoencoder(config).to(dtype).eval()
        latents = torch.empty(
            at_once, config.latent_channels, height // config.compression, width // config.compression, dtype=dtype
        )
        counter = LiveBytes()
        counter.leave_out(dict(model.named_parameters()) | dict(model.named_buffers()))
        with torch.no_grad(), counter:
            model.decode(latents)
    return counter.peak


def optimizer_bytes(config: OptimConfig) -> float:
    """Return the bytes of the optimizer's states for each trained weight.

    CAME's rows and columns are left out: they are below a hundredth of the rest.
    """
    scale = 4 / 256  # 8-bit states have a float32 scale for each 256 values
    return {"adamw": 8.0, "adamw_8bit": 2 * (1 + scale), "came": 4.0, "came_8bit": 1 + scale}[config.optimizer]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one device at the moment when most is in use.

    parts: name of the part -> bytes. moment: name of the moment, such as "forward and backward".
    """

    parts: Mapping[str, int]
    moment: str

    @classmethod
    def largest(cls, fixed: Mapping[str, int], moments: Mapping[str, Mapping[str, int]]) -> "Memory":
        """The moment that takes most, with what is always held. moments: name -> name of the part -> bytes."""
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        return cls(parts={name: size for name, size in {**fixed, **moments[moment]}.items() if size}, moment=moment)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def estimate_memory(
    training: TrainConfig,
    sizes: ModelSizes,
    *,
    activations: int,
    text_activations: int,
    decoding: int,
    on_gpu: bool,
) -> Memory:
    """Estimate the memory of the device of rank 0, which holds the autoencoder too.

    Args:
        training: the training.
        sizes: numbers of weights.
        activations: bytes, from `count_activations`.
        text_activations: bytes, from `count_text_activations`; 0 if captions are not encoded on the device.
        decoding: bytes, from `count_decoding`.
        on_gpu: the device is a GPU, on which CUDA takes memory too.
    """
    engine = training.engine
    fixed = {
        **held_always(training, sizes.transformer, sizes.trained),
        "text encoder": engine.torch_dtype.itemsize * sizes.text_encoder,
        "autoencoder, for grids": engine.torch_dtype.itemsize * sizes.autoencoder,
        "CUDA context and libraries": CONTEXT_BYTES if on_gpu else 0,
    }
    gradients, bucket = gradient_bytes(training, sizes.trained)
    # ZeRO 2 allocates its share of the gradients after the backward pass, when the activations are freed.
    kept = 0 if engine.zero_stage == 2 and training.grad_accum_steps == 1 else gradients
    moments = {
        "forward and backward": {"gradients": kept, "buckets of gradients": bucket, "activations": activations},
        "the optimizer's step": {"gradients": gradients, "step": step_bytes(engine, sizes.trained)},
        "encoding captions": {"gradients": gradients, "text encoder's activations": text_activations},
    }
    if training.grid.prompts:
        copy_bytes = sizes.transformer * engine.torch_dtype.itemsize
        moments["drawing a grid"] = {"a copy of the weights": copy_bytes, "decoding": decoding}
    return Memory.largest(fixed, moments)


def held_always(training: LoopConfig, total: int, trained: int) -> dict[str, int]:
    """Return the bytes of what DeepSpeed holds of a model during the whole training, by part.

    Args:
        training: the training.
        total: number of the model's weights.
        trained: those of them that are trained.
    """
    engine, size = training.engine, training.engine.torch_dtype.itemsize
    share = training.num_workers if engine.zero_stage else 1
    weights = size * total
    if engine.zero_stage == 3:  # this worker's part, and the weights that are gathered at a time
        part = 0 if engine.offload_weights else weights // training.num_workers
        weights = part + size * min(total, LIVE_WEIGHTS) * (training.num_workers > 1)
    has_masters = engine.dtype != "fp32" or engine.zero_stage > 0
    on_device = 0 if engine.offload_optimizer else 1
    return {
        "weights": weights,
        "float32 weights of the optimizer": on_device * has_masters * 4 * trained // share,
        "states of the optimizer": on_device * int(optimizer_bytes(training.optim) * trained) // share,
        "average of the weights": on_device * 4 * trained // share,  # the average lies where the master weights lie
    }


def gradient_bytes(training: LoopConfig, trained: int) -> tuple[int, int]:
    """Return the bytes of the gradients of so many weights, and of the buckets in which they are sent."""
    engine, size = training.engine, training.engine.torch_dtype.itemsize
    if engine.zero_stage < 2:
        # In 16 bits, ZeRO 1 also sums all gradients in float32, on each worker, beside those of the backward pass.
        whole = 4 if engine.zero_stage == 1 and engine.dtype != "fp32" else 0
        return (size + whole) * trained, 0
    kept = 0 if engine.offload_optimizer else 4 * trained // training.num_workers
    if engine.zero_stage == 3:  # which sums gradients in the bucket itself
        size = {"fp32": 4, "bf16": 2}[engine.reduce_dtype]
    return kept, size * BUCKET


def step_bytes(engine: EngineConfig, trained: int) -> int:
    """Return the bytes that only the optimizer's step takes: ZeRO 0 copies the gradients to float32."""
    return 4 * trained if engine.zero_stage == 0 and engine.dtype != "fp32" else 0
