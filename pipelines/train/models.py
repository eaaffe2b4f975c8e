"""The models that a training starts from, loaded and checked to fit together."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pipelines.train.config import TrainConfig
from pipelines.train.engine.lora import add_lora
from pipelines.train.host_text_encoder import HostTextEncoder
from pipelines.train.stream.captions import DroppedCaption
from sana_model.files.pipeline import Companions, find_companions
from sana_model.files.places import resolve
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import PRESETS, SanaConfig, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage


@dataclass(frozen=True, kw_only=True)
class TrainModels:
    """The models beside the transformer that is trained, as one rank holds them.

    transformer_config: shape of the transformer, without adapters.
    shift: shift of the noise levels.
    text_encoder: on the training's device; with stored embeddings on the CPU of rank 0, and None on other ranks.
    null: what samples train on whose captions are dropped, on the training's device.
    autoencoder: on the device of rank 0, where pictures are drawn; None on other ranks.
    logvar: what the weights of `init` held besides, and the trained pipeline keeps: see `SanaTransformer.logvar`.
    """

    transformer_config: SanaConfig
    shift: float
    text_encoder: TextEncoder | None
    null: DroppedCaption
    autoencoder: DCAutoencoder | None
    logvar: dict[str, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the noise levels to train at are `whole_sigmas`."""
        return self.transformer_config.time_input == "whole"

    @classmethod
    def load(cls, config: TrainConfig, *, device: torch.device, rank: int) -> tuple[SanaTransformer, "TrainModels"]:
        """Return the transformer to train, with its adapters, on the CPU, and the other models. Raises like `load_start`."""
        start = load_start(config)
        transformer, transformer_config = start.transformer, start.transformer.config
        # Some of Gemma's activations are too large for float16.
        dtype = torch.bfloat16 if config.engine.dtype == "fp16" else config.engine.torch_dtype
        encoder: TextEncoder
        text_encoder: TextEncoder | None
        if config.caption_embeds is None:
            encoder = text_encoder = start.text_encoder.to(device, dtype)
        else:
            encoder = HostTextEncoder(start.text_encoder.to("cpu", dtype), device)
            text_encoder = encoder if rank == 0 else None
        if config.lora is not None:
            add_lora(transformer, config.lora, seed=config.seed)
        models = cls(
            transformer_config=transformer_config,
            shift=start.flow_shift,
            text_encoder=text_encoder,
            null=DroppedCaption.encode(encoder, transformer_config.null_caption),
            autoencoder=start.autoencoder.to(device, dtype) if rank == 0 else None,
            logvar=transformer.logvar,
        )
        return transformer.train(), models


def load_start(config: TrainConfig) -> TextToImage:
    """Load the pipeline that training starts from: the transformer in float32, the other models in their stored dtype.

    Raises FileNotFoundError if a model does not exist, and ValueError, naming what differs, if models do not fit together.
    """
    if config.init is not None:
        pipeline = TextToImage.from_pretrained(
            config.init,
            precision="full",  # refuses weights that were saved with fewer bits: they cannot be trained
            autoencoder=config.autoencoder,
            text_encoder=config.text_encoder,
            flow_shift=config.flow.shift,
            **config.transformer_overrides,
        )
        pipeline.transformer.float()
        if config.preset is not None:
            check_shape(pipeline.transformer.config, config.preset)
        if config.prompts is not None:
            encoder = pipeline.text_encoder
            pipeline.text_encoder = TextEncoder(encoder.model, encoder.tokenizer, config.prompts)
        return pipeline
    assert config.preset is not None and config.autoencoder is not None and config.text_encoder is not None
    companions = find_training_companions(config, None)
    autoencoder = DCAutoencoder.from_pretrained(companions.autoencoder)
    text_encoder = TextEncoder.from_pretrained(companions.text_encoder, config=companions.prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transformer = SanaTransformer.from_preset(
            config.preset,
            in_channels=autoencoder.config.latent_channels,
            caption_dim=text_encoder.embed_dim,
            **config.transformer_overrides,
        )
    return TextToImage(transformer, autoencoder, text_encoder, flow_shift=companions.flow_shift)


def load_start_transformer(config: TrainConfig) -> SanaTransformer:
    """Load the transformer of `load_start` alone, as far as `init` names one. Raises as `load_start`."""
    if config.init is None:
        return load_start(config).transformer
    return SanaTransformer.from_pretrained(config.init, **config.transformer_overrides).float()


def check_shape(found: SanaConfig, preset: str) -> None:
    """Raise ValueError if a transformer's weights do not have the shapes of a preset."""
    expected = PRESETS[preset]
    for name in ("dim", "depth", "ffn_dim", "num_cross_heads", "patch_size", "in_channels", "caption_dim", "qk_norm"):
        if getattr(found, name) != getattr(expected, name):
            raise ValueError(
                f"init has {name}={getattr(found, name)} and preset={preset} {getattr(expected, name)}: "
                "leave preset out, or name the right one"
            )


def find_text_encoder(training: TrainConfig) -> tuple[str, TextEncoderConfig]:
    """Return the path of the training's text encoder, and how captions become tokens.

    Raises FileNotFoundError if `init` does not exist.
    """
    folder = resolve(training.init) if training.init is not None else None
    companions = find_training_companions(training, folder)
    return companions.text_encoder, companions.prompts


def find_training_companions(training: TrainConfig, init: Path | None) -> Companions:
    """Find the models beside the transformer: those that the training's configuration names, the others as `init` has them.

    `init`: folder of the pipeline on this machine; None: take the published models. Raises like `find_companions`.
    """
    found = find_companions(init)
    if training.text_encoder is not None:
        found = replace(found, text_encoder=training.text_encoder, tokenizer=None)
    return replace(
        found,
        autoencoder=training.autoencoder or found.autoencoder,
        prompts=training.prompts or found.prompts,
        flow_shift=found.flow_shift if training.flow.shift is None else training.flow.shift,
    )
