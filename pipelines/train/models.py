"""The models that a training starts from, loaded and checked to fit together."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.train.config import TrainConfig
from pipelines.train.engine.lora import add_lora
from pipelines.train.stream.captions import HostTextEncoder
from sana_model.files.pipeline import DEFAULT_AUTOENCODER, load_pipeline
from sana_model.files.places import resolve
from sana_model.files.tensors import read_json
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DEFAULT_MODEL, DIFFUSERS_PROMPTS, NVLABS_PROMPTS, PRESETS, SanaConfig, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import DEFAULT_FLOW_SHIFT, Caption, TextToImage


@dataclass(frozen=True, kw_only=True)
class TrainModels:
    """The models beside the transformer that is trained, as one rank holds them.

    transformer_config: shape of the transformer, without adapters.
    shift: shift of the noise levels.
    text_encoder: on the training's device; with stored embeddings on the CPU of rank 0, and None on other ranks.
    null: the encoded null caption, on the training's device.
    autoencoder: on the device of rank 0, where pictures are drawn; None on other ranks.
    """

    transformer_config: SanaConfig
    shift: float
    text_encoder: TextEncoder | None
    null: Caption
    autoencoder: DCAutoencoder | None

    @classmethod
    def load(cls, config: TrainConfig, *, device: torch.device, rank: int) -> tuple[SanaTransformer, "TrainModels"]:
        """Return the transformer to train, with its adapters, on the CPU, and the other models. Raises like `load_start`."""
        start = load_start(config)
        transformer, transformer_config = start.transformer, start.transformer.config
        # Some of Gemma's activations are too large for float16.
        dtype = torch.bfloat16 if config.engine.dtype == "fp16" else config.engine.torch_dtype
        text_encoder: TextEncoder | None
        if config.caption_embeds is None:
            text_encoder = start.text_encoder.to(device, dtype)
            null = text_encoder.null()
        else:
            host = HostTextEncoder(start.text_encoder.to("cpu", dtype), device)
            null, text_encoder = host.null(), host if rank == 0 else None
        if config.lora is not None:
            add_lora(transformer, config.lora, seed=config.seed)
        models = cls(
            transformer_config=transformer_config,
            shift=start.flow_shift,
            text_encoder=text_encoder,
            null=null,
            autoencoder=start.autoencoder.to(device, dtype) if rank == 0 else None,
        )
        return transformer.train(), models


def load_start(config: TrainConfig) -> TextToImage:
    """Load the pipeline that training starts from: the transformer in float32, the other models in their stored dtype.

    Raises FileNotFoundError if a model does not exist, and ValueError, naming what differs, if models do not fit together.
    """
    if config.init is not None:
        pipeline = load_pipeline(
            config.init,
            autoencoder=config.autoencoder,
            text_encoder=config.text_encoder,
            flow_shift=config.flow.shift,
            **config.positions.overrides,
        )
        pipeline.transformer.float()
        if config.preset is not None:
            check_shape(pipeline.transformer.config, config.preset)
        if config.prompts is not None:
            encoder = pipeline.text_encoder
            pipeline.text_encoder = TextEncoder(encoder.model, encoder.tokenizer, config.prompts)
        return pipeline
    assert config.preset is not None and config.autoencoder is not None and config.text_encoder is not None
    autoencoder = DCAutoencoder.from_pretrained(config.autoencoder)
    text_encoder = TextEncoder.from_pretrained(config.text_encoder, config=config.prompts or NVLABS_PROMPTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transformer = SanaTransformer.from_preset(
            config.preset,
            in_channels=autoencoder.config.latent_channels,
            caption_dim=text_encoder.embed_dim,
            **config.positions.overrides,
        )
    shift = DEFAULT_FLOW_SHIFT if config.flow.shift is None else config.flow.shift
    return TextToImage(transformer, autoencoder, text_encoder, flow_shift=shift)


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
    """Path of the training's text encoder, and how captions become tokens. Raises FileNotFoundError if `init` is not there."""
    folder = resolve(training.init) if training.init is not None else None
    _, path, _, prompts = _companions(training, folder)
    return path, prompts


def _companions(training: TrainConfig, folder: Path | None) -> tuple[str, str, str, TextEncoderConfig]:
    """Paths of autoencoder, text encoder and its tokenizer, and how captions become tokens: as `load_pipeline` finds them."""
    autoencoder, text, tokenizer, prompts = DEFAULT_AUTOENCODER, DEFAULT_MODEL, None, NVLABS_PROMPTS
    if folder is not None and (folder / "pipeline.json").exists():
        prompts = TextEncoderConfig(**read_json(folder / "pipeline.json")["prompts"])
        autoencoder, text = str(folder / "autoencoder"), str(folder / "text_encoder")
    elif folder is not None and (folder / "model_index.json").exists():
        prompts = DIFFUSERS_PROMPTS
        autoencoder, text, tokenizer = str(folder / "vae"), str(folder / "text_encoder"), str(folder / "tokenizer")
    if training.text_encoder is not None:
        text, tokenizer = training.text_encoder, None
    return training.autoencoder or autoencoder, text, tokenizer or text, training.prompts or prompts
