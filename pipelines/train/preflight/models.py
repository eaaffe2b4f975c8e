"""The shapes of the models that a training will load, found without loading weights wherever possible."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, Gemma2Config

from pipelines.train.config import TrainConfig
from pipelines.train.models import find_training_companions
from sana_model.files.pipeline import Companions
from sana_model.files.places import published_address, resolve
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import (
    AUTOENCODER_PRESETS,
    DEFAULT_TEXT_ENCODER,
    PRESETS,
    AutoencoderConfig,
    SanaConfig,
    TextEncoderConfig,
)
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer

KNOWN_TEXT_ENCODERS = {DEFAULT_TEXT_ENCODER: Gemma2Config()}
"""Text encoders whose shape is known without their files; the defaults of `Gemma2Config` are those of gemma-2-2b."""


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """The models that a training will load.

    A model that is neither on this machine nor known by its name has the shape None and the size 0.

    transformer, autoencoder: their shapes.
    text_encoder: transformers' configuration of the text encoder.
    autoencoder_name, text_encoder_path: where the training loads them from.
    autoencoder_size, text_encoder_size: numbers of weights.
    prompts: how captions become tokens.
    caption_counter: a text encoder without weights that can count tokens; None if its tokenizer is not on this machine.
    """

    transformer: SanaConfig
    autoencoder: AutoencoderConfig | None
    autoencoder_name: str
    autoencoder_size: int
    text_encoder: Any
    text_encoder_path: str
    text_encoder_size: int
    prompts: TextEncoderConfig
    caption_counter: TextEncoder | None


def find_shapes(training: TrainConfig, problems: list[str]) -> ModelShapes:
    """Find the shapes of the training's models, and add to `problems` what cannot be known.

    Raises FileNotFoundError or ValueError if that is the shape of the transformer.
    """
    folder = _local_pipeline(training, problems)
    companions = find_training_companions(training, folder)
    autoencoder = find_autoencoder(companions.autoencoder, problems)
    text_encoder, counter = find_text_encoder(companions, problems)
    text_size, autoencoder_size = count_companions(text_encoder, autoencoder)
    return ModelShapes(
        transformer=_find_transformer(training, folder, autoencoder, text_encoder),
        autoencoder=autoencoder,
        autoencoder_name=companions.autoencoder,
        autoencoder_size=autoencoder_size,
        text_encoder=text_encoder,
        text_encoder_path=companions.text_encoder,
        text_encoder_size=text_size,
        prompts=companions.prompts,
        caption_counter=counter,
    )


def count_companions(text_encoder: Any, autoencoder: AutoencoderConfig | None) -> tuple[int, int]:
    """Return the numbers of weights of a text encoder and of an autoencoder; 0 for None."""
    with torch.device("meta"):
        models = (
            AutoModel.from_config(text_encoder, trust_remote_code=False) if text_encoder is not None else None,
            DCAutoencoder(autoencoder) if autoencoder is not None else None,
        )
    text_size, size = (0 if model is None else sum(weight.numel() for weight in model.parameters()) for model in models)
    return text_size, size


def _local_pipeline(training: TrainConfig, problems: list[str]) -> Path | None:
    """Return the folder of `init` on this machine.

    Returns None if there is no `init`, or if it is not on this machine and `preset` tells its shape.
    """
    if training.init is None:
        return None
    init = published_address(training.init) or training.init
    try:
        return resolve(init) if "://" not in init or init.startswith(("zoo://", "file://")) or not training.preset else None
    except FileNotFoundError:
        if training.preset is None:
            raise
        problems.append(f"init={init} is not there (yet): its shape is taken from preset={training.preset}")
        return None


def _find_transformer(
    training: TrainConfig, folder: Path | None, autoencoder: AutoencoderConfig | None, text_encoder: Any
) -> SanaConfig:
    if training.preset is not None:
        config = PRESETS[training.preset]
        if training.init is None and autoencoder is not None:
            config = replace(config, in_channels=autoencoder.latent_channels)
        if training.init is None and text_encoder is not None:
            config = replace(config, caption_dim=text_encoder.hidden_size)
    else:
        assert folder is not None
        config = SanaTransformer.from_pretrained(folder).config
    return replace(config, **training.transformer_overrides)


def find_autoencoder(path: str, problems: list[str]) -> AutoencoderConfig | None:
    """Return an autoencoder's shape; None, and a sentence in `problems`, if it is neither here nor known by its name."""
    if (found := known_autoencoder(path)) is None:
        problems.append(f"the autoencoder {path} is not on this machine: its memory is not counted")
    return found


def known_autoencoder(path: str) -> AutoencoderConfig | None:
    """Return the shape of an autoencoder that is on this machine or known by its name. Raises as `resolve`."""
    if (place := _if_here(path)) is not None:
        return DCAutoencoder.from_pretrained(place).config
    return next((config for name, config in AUTOENCODER_PRESETS.items() if "-" in name and name in path), None)


def find_text_encoder(companions: Companions, problems: list[str]) -> tuple[Any, TextEncoder | None]:
    """Return transformers' configuration of the text encoder, and `ModelShapes.caption_counter`; None is told in `problems`."""
    path, tokenizer_path = companions.text_encoder, companions.tokenizer or companions.text_encoder
    place = _if_here(path)
    try:
        config = AutoConfig.from_pretrained(place or path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        config = KNOWN_TEXT_ENCODERS.get(path)
    if config is None:
        problems.append(f"the text encoder {path} is not on this machine: its memory is not counted")
        return None, None
    try:
        tokenizer_place = _if_here(tokenizer_path) or tokenizer_path
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        problems.append(
            f"the tokenizer of {path} is not on this machine: tokens of captions are not counted, and all captions are taken "
            "to be as long as allowed"
        )
        return config, None
    with torch.device("meta"):
        return config, TextEncoder(AutoModel.from_config(config, trust_remote_code=False), tokenizer, companions.prompts)


def _if_here(path: str) -> Path | None:
    """Return the path of a model that is on this machine; None if it would have to be fetched."""
    if "://" in path and not path.startswith(("zoo://", "file://")):
        return None
    return resolve(path) if "://" in path or Path(path).exists() else None
