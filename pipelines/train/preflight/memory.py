"""How much memory a training takes on each device, by part: counted on fake tensors, before any device is taken.

Activations are those of the very model: its forward and backward pass run on tensors without values, and what is alive at each
moment is counted. What DeepSpeed holds was read off it at work, in each stage.
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
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AutoencoderConfig, SanaConfig
from sana_model.nn.text_encoder import MAX_FORWARD_TOKENS
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import CaptionTokens
from sana_model.pipeline import MAX_DECODE_PIXELS

BUCKET = 500_000_000
"""Elements of gradients that DeepSpeed collects before it sends them (`reduce_bucket_size`), from ZeRO 2 on."""
LIVE_WEIGHTS = 1_000_000_000
"""Elements of gathered weights that ZeRO 3 keeps at most (`stage3_max_live_parameters`)."""
CONTEXT_BYTES = 2**30
"""What a GPU's driver, cuBLAS and NCCL take, about; not on a CPU."""


class LiveBytes(TorchDispatchMode):
    """Within, counts the bytes of tensors that operations make, as long as they are alive. `peak`: the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Do not count these, which were there before."""
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
    """Numbers of weights: of the transformer and of those that are trained, of the text encoder and the autoencoder."""

    transformer: int
    trained: int
    text_encoder: int
    autoencoder: int


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The largest micro-batch: samples, height and width of their latents, and real tokens of a caption."""

    samples: int
    height: int
    width: int
    caption_tokens: int


@contextmanager
def fake_transformer(config: SanaConfig, training: TrainConfig) -> Iterator[SanaTransformer]:
    """The model as it is trained, adapters and all, without values; what is computed within has none either."""
    with torch.device("meta"):
        model = SanaTransformer(config)
        if training.lora is not None:
            add_lora(model, training.lora, seed=0)
    model.enable_gradient_checkpointing(training.engine.checkpoint_blocks)
    with FakeTensorMode():
        _make_fake(model, training.engine.torch_dtype)
        yield model.train()


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights of this dtype, without values, in place of those on the meta device. (`.to` cannot do it.)"""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=weight.requires_grad)
            module.register_parameter(name, fake)


def count_weights(model: nn.Module) -> tuple[int, int]:
    """All of them, and those that are trained."""
    weights = list(model.parameters())
    return sum(weight.numel() for weight in weights), sum(weight.numel() for weight in weights if weight.requires_grad)


def count_activations(model: SanaTransformer, shape: StepShape, dtype: torch.dtype) -> int:
    """Bytes at the peak of a micro-batch's forward and backward pass, without weights and their gradients.

    `model` comes from `fake_transformer`. Captions count as if each had `caption_tokens`.
    """
    config = model.config
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(_forget_gradient)
    counter = LiveBytes()
    counter.leave_out(dict(model.named_parameters()))
    with counter:
        latents = torch.empty(shape.samples, config.in_channels, shape.height, shape.width, dtype=torch.float32)
        noise, noisy = torch.empty_like(latents), torch.empty_like(latents, dtype=dtype)
        timestep = torch.empty(shape.samples, dtype=torch.float32)
        num_tokens = shape.samples * shape.caption_tokens
        embeds = torch.empty(num_tokens, config.caption_dim, dtype=dtype)
        # With a mask, as captions of unequal length have it.
        mask = torch.ones(shape.samples, 1, 1, shape.caption_tokens, dtype=torch.bool)
        positions = torch.arange(num_tokens)
        captions = CaptionTokens(model.caption_proj(embeds), positions, mask, shape.samples, shape.caption_tokens)
        velocity = model(noisy, timestep, captions)
        (velocity.float() - (noise - latents)).square().flatten(1).mean(1).mean().backward()
    return counter.peak


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None


def count_text_activations(config: Any, samples: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes at the peak of the text encoder's forward pass; `config`: transformers' own of a decoder-only model."""
    from transformers import AutoModel

    with FakeTensorMode():
        model = AutoModel.from_config(config, dtype=dtype).eval()
        rows = min(samples, max(MAX_FORWARD_TOKENS // tokens, 1))
        counter = LiveBytes()
        counter.leave_out(dict(model.named_parameters()) | dict(model.named_buffers()))
        with torch.no_grad(), counter:
            model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    return counter.peak


def count_decoding(config: AutoencoderConfig, pictures: int, size: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes at the peak of decoding a grid's pictures, of `size` pixels, as `TextToImage` does it."""
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
    """For each trained weight. Rows, columns and scales that 8-bit AdamW and CAME keep are below a hundredth of it."""
    scale = 4 / 256  # of 8 bits: a float32 for each 256
    return {"adamw": 8.0, "adamw_8bit": 2 * (1 + scale), "came": 4.0, "came_8bit": 1 + scale}[config.optimizer]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by part, while the most is in use; and the moment when that is."""

    parts: Mapping[str, int]
    moment: str

    @property
    def total(self) -> int:
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
    """Of rank 0, which holds the autoencoder too."""
    engine = training.engine
    fixed = _held_always(training, sizes) | {"CUDA context and libraries": CONTEXT_BYTES if on_gpu else 0}
    gradients, bucket = _gradients(training, sizes)
    # ZeRO 2 makes its share of the gradients when a backward pass is over and its activations are gone.
    kept = 0 if engine.zero_stage == 2 and training.grad_accum_steps == 1 else gradients
    moments = {
        "forward and backward": {"gradients": kept, "buckets of gradients": bucket, "activations": activations},
        "the optimizer's step": {"gradients": gradients, "step": _step_bytes(engine, sizes)},
        "encoding captions": {"gradients": gradients, "text encoder's activations": text_activations},
    }
    if training.grid.prompts:
        copy_bytes = sizes.transformer * engine.torch_dtype.itemsize
        moments["drawing a grid"] = {"a copy of the weights": copy_bytes, "decoding": decoding}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in (fixed | moments[moment]).items() if size}
    return Memory(parts=parts, moment=moment)


def _held_always(training: TrainConfig, sizes: ModelSizes) -> dict[str, int]:
    engine, size = training.engine, training.engine.torch_dtype.itemsize
    share = training.num_workers if engine.zero_stage else 1
    weights = size * sizes.transformer
    if engine.zero_stage == 3:  # this worker's part, and what is gathered at a time
        part = 0 if engine.offload_weights else weights // training.num_workers
        weights = part + size * min(sizes.transformer, LIVE_WEIGHTS) * (training.num_workers > 1)
    has_masters = engine.dtype != "fp32" or engine.zero_stage > 0
    on_device = 0 if engine.offload_optimizer else 1
    return {
        "weights": weights,
        "float32 weights of the optimizer": on_device * has_masters * 4 * sizes.trained // share,
        "states of the optimizer": on_device * int(optimizer_bytes(training.optim) * sizes.trained) // share,
        "average of the weights": on_device * 4 * sizes.trained // share,  # on the device of the optimizer's weights
        "text encoder": size * sizes.text_encoder,
        "autoencoder, for grids": size * sizes.autoencoder,
    }


def _gradients(training: TrainConfig, sizes: ModelSizes) -> tuple[int, int]:
    """Bytes of the gradients, and of the buckets in which they are sent."""
    engine, size = training.engine, training.engine.torch_dtype.itemsize
    if engine.zero_stage < 2:
        # In bf16, ZeRO 1 adds them up in float32, all of them on each worker, beside those that the backward pass makes.
        whole = 4 if engine.zero_stage == 1 and engine.dtype != "fp32" else 0
        return (size + whole) * sizes.trained, 0
    kept = 0 if engine.offload_optimizer else 4 * sizes.trained // training.num_workers
    if engine.zero_stage == 3:  # sums them in the bucket itself
        size = {"fp32": 4, "bf16": 2}[engine.reduce_dtype]
    return kept, size * BUCKET


def _step_bytes(engine: EngineConfig, sizes: ModelSizes) -> int:
    """What the optimizer's step holds beside all else: ZeRO 0 copies the gradients to float32."""
    return 4 * sizes.trained if engine.zero_stage == 0 and engine.dtype != "fp32" else 0
