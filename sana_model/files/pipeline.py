"""Load and save the whole pipeline: our own folder, diffusers' `SanaPipeline` folder, an NVlabs `.pth` with its companions."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sana_model.files.models import check_layout, save_transformer
from sana_model.files.places import local_target, resolve
from sana_model.files.published_configs import DIFFUSERS_VERSION
from sana_model.files.tensors import PIPELINE_INDEXES, find_variant, read_json, write_json
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DEFAULT_MODEL, DIFFUSERS_PROMPTS, NVLABS_PROMPTS, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import DEFAULT_FLOW_SHIFT, TextToImage

DEFAULT_AUTOENCODER = "hf://mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    flow_shift: float | None = None,
    **overrides: Any,
) -> TextToImage:
    """A pipeline from our own folder, diffusers' `SanaPipeline` folder, or an NVlabs `.pth`; local, hf:// or an fsspec URI.

    A `.pth` holds the transformer alone: `autoencoder` and `text_encoder` then name the others (published ones by default).
    They also replace what a folder holds, as does `flow_shift`. A diffusers folder is prompted as `SanaPipeline` does.
    `use_ema` and `overrides` are those of `weights.load_transformer`.

    Raises FileNotFoundError or ValueError as `weights.load_transformer` does.
    """
    local = resolve(path)
    prompts, shift, tokenizer = NVLABS_PROMPTS, DEFAULT_FLOW_SHIFT, None
    autoencoder_source: str | Path = DEFAULT_AUTOENCODER
    text_source: str | Path = DEFAULT_MODEL
    if (local / "pipeline.json").exists():
        settings = read_json(local / "pipeline.json")
        prompts, shift = TextEncoderConfig(**settings["prompts"]), settings["flow_shift"]
        autoencoder_source, text_source = local / "autoencoder", local / "text_encoder"
    elif (local / "model_index.json").exists():
        scheduler = read_json(local / "scheduler" / "scheduler_config.json")
        prompts, shift = DIFFUSERS_PROMPTS, scheduler.get("flow_shift", scheduler.get("shift", shift))
        autoencoder_source, text_source, tokenizer = local / "vae", local / "text_encoder", local / "tokenizer"
    elif local.is_dir():
        raise ValueError(f"{path} is no pipeline: it has neither pipeline.json (ours) nor model_index.json (diffusers)")
    if text_encoder is not None:
        text_source, tokenizer = text_encoder, None
    return TextToImage(
        SanaTransformer.from_pretrained(local, use_ema=use_ema, dtype=dtype, **overrides),
        DCAutoencoder.from_pretrained(autoencoder or autoencoder_source, dtype=dtype),
        TextEncoder.from_pretrained(
            text_source,
            config=prompts,
            dtype=dtype,
            tokenizer_path=tokenizer,
            variant=find_variant(Path(text_source)) if Path(text_source).is_dir() else None,
        ),
        flow_shift=shift if flow_shift is None else flow_shift,
    )


def save_pipeline(pipeline: TextToImage, path: str | Path, *, layout: str = "sana") -> None:
    """Write a folder of ours, a folder that diffusers' `SanaPipeline` loads, or ("nvlabs") the transformer's `.pth`.

    A `.pth` carries the null caption's embeddings, which NVlabs' training puts in place of dropped captions: they are computed
    here if the transformer came without. diffusers has no place for our instruction text: it prompts with its own.

    Raises ValueError for another layout or a URI.
    """
    folder = local_target(path)
    if check_layout(layout) == "nvlabs":
        save_transformer(pipeline.transformer, folder, layout=layout, null_caption_embeds=_padded_null_caption(pipeline))
        return
    for index in PIPELINE_INDEXES:  # written last: a save that is cut short, or in another layout, leaves no old pipeline
        (folder / index).unlink(missing_ok=True)
    pipeline.transformer.save_pretrained(folder / "transformer", layout=layout)
    if layout == "diffusers":
        _save_diffusers_companions(pipeline, folder)
        return
    pipeline.autoencoder.save_pretrained(folder / "autoencoder")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    prompts = asdict(pipeline.text_encoder.config)
    settings = {"model_type": "sana_pipeline", "flow_shift": pipeline.flow_shift, "prompts": prompts}
    write_json(folder / "pipeline.json", settings)


def _padded_null_caption(pipeline: TextToImage) -> torch.Tensor:
    """(max_tokens, caption_dim), zeros behind the null caption's tokens."""
    caption_embeds, _ = pipeline.text_encoder.null()
    padded = caption_embeds.new_zeros(pipeline.text_encoder.config.max_tokens, caption_embeds.shape[-1])
    padded[: caption_embeds.shape[1]] = caption_embeds[0]
    return padded


def _save_diffusers_companions(pipeline: TextToImage, folder: Path) -> None:
    """All but the transformer."""
    pipeline.autoencoder.save_pretrained(folder / "vae", layout="diffusers")
    model, tokenizer = pipeline.text_encoder.model, pipeline.text_encoder.tokenizer
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": pipeline.flow_shift,
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "SanaPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", type(model).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    write_json(folder / "model_index.json", index)
