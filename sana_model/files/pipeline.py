"""Find, load and save the parts of a pipeline.

A pipeline is our own folder, diffusers' `SanaPipeline` folder, or an NVlabs `.pth`, which holds the transformer alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_model.files.checkpoint import PIPELINE_INDEXES, check_layout, find_pth, note_precision
from sana_model.files.controlnet import holds_controlnet, load_controlnet, save_controlnet
from sana_model.files.json_files import read_json
from sana_model.files.models import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)
from sana_model.files.places import local_target, resolve
from sana_model.files.published_configs import DIFFUSERS_VERSION
from sana_model.files.tensors import find_variant, write_json
from sana_model.flow import DEFAULT_FLOW_SHIFT
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DEFAULT_AUTOENCODER, DEFAULT_TEXT_ENCODER, DIFFUSERS_PROMPTS, NVLABS_PROMPTS, TextEncoderConfig
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.zoo.published import find_published


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The models that a transformer draws pictures with, as paths, and two settings. The defaults are the published ones."""

    autoencoder: str = DEFAULT_AUTOENCODER
    text_encoder: str = DEFAULT_TEXT_ENCODER
    tokenizer: str | None = None
    """None: it lies with the text encoder."""
    prompts: TextEncoderConfig = NVLABS_PROMPTS
    flow_shift: float = DEFAULT_FLOW_SHIFT
    controlnet: str | None = None


@dataclass(frozen=True, kw_only=True)
class PipelineParts:
    """The loaded models of a pipeline, and the shift of its sampling grid."""

    transformer: SanaTransformer
    autoencoder: DCAutoencoder
    text_encoder: TextEncoder
    flow_shift: float
    controlnet: SanaControlNet | None = None


def find_companions(path: Path | None) -> Companions:
    """Find the companions of a transformer, without loading them.

    Args:
        path: a local pipeline folder, ours or diffusers', which names its companions; or a weights file (NVlabs' `.pth`), a
            folder that holds only such a file, or None, which name none: they get the published ones.

    Raises ValueError if `path` is a folder but no pipeline, or if its index is damaged; FileNotFoundError if a diffusers folder
    has no scheduler.
    """
    if path is None:
        return Companions()
    known = find_published(path)
    shift = DEFAULT_FLOW_SHIFT if known is None else known.flow_shift
    if path.is_file():
        return Companions(flow_shift=shift)
    if (path / "pipeline.json").exists():
        settings = read_json(path / "pipeline.json")
        try:
            prompts, flow_shift = TextEncoderConfig(**settings["prompts"]), settings["flow_shift"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path / 'pipeline.json'} has other fields than ours ({error}): damaged, or of a newer version"
            ) from error
        return Companions(
            autoencoder=str(path / "autoencoder"),
            text_encoder=str(path / "text_encoder"),
            prompts=prompts,
            flow_shift=flow_shift,
            controlnet=_controlnet_of(path),
        )
    if (path / "model_index.json").exists():
        scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        return Companions(
            autoencoder=str(path / "vae"),
            text_encoder=str(path / "text_encoder"),
            tokenizer=str(path / "tokenizer"),
            prompts=DIFFUSERS_PROMPTS,
            flow_shift=scheduler.get("flow_shift", scheduler.get("shift", DEFAULT_FLOW_SHIFT)),
            controlnet=_controlnet_of(path),
        )
    if not (path / "config.json").exists() and find_pth(path) is not None:
        return Companions(flow_shift=shift)
    raise ValueError(f"{path} is no pipeline: it has neither pipeline.json (ours) nor model_index.json (diffusers)")


def _controlnet_of(path: Path) -> str | None:
    """The ControlNet's folder in a pipeline's; None if it has none."""
    folder = path / "controlnet"
    return str(folder) if (folder / "config.json").exists() else None


def load_parts(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    flow_shift: float | None = None,
    variant: str | None = None,
    controlnet: str | Path | SanaControlNet | None = None,
    on_part: Callable[[nn.Module], object] | None = None,
    **overrides: Any,
) -> PipelineParts:
    """Load every model of a pipeline, in eval mode.

    Args:
        path: our own folder, diffusers' `SanaPipeline` folder, or an NVlabs `.pth`; local, or an hf://, zoo:// or fsspec URI.
        dtype: of all models, but float16 gives the text encoder bfloat16: some of Gemma's activations are too large for
            float16. None keeps what each file holds.
        autoencoder, text_encoder: paths that replace what the folder holds. A `.pth` holds neither: the published ones are
            taken unless these are given.
        flow_shift: replaces the pipeline's.
        variant: the one in the names of the weights' files ("bf16"); None: the plain one, or the one that fits `dtype`.
        controlnet: a ControlNet, or the path of one; None: the one that the folder or the `.pth` holds, if it holds one. It
            gets the transformer's dtype.
        on_part: called with each part as soon as it is loaded, before the next one is.
        use_ema, overrides: those of `load_transformer`.

    A diffusers folder is prompted as `SanaPipeline` does it, everything else as our folder says or as NVlabs does.

    Raises FileNotFoundError or ValueError as `find_companions` and `load_transformer` do.
    """
    local = resolve(path)
    companions = find_companions(local)
    text_source, tokenizer = companions.text_encoder, companions.tokenizer
    if text_encoder is not None:
        text_source, tokenizer = str(text_encoder), None
    autoencoder = str(autoencoder or companions.autoencoder)
    is_folder = any((local / index).exists() for index in PIPELINE_INDEXES)
    _check_parts(local, [str(local / "transformer") if is_folder else None, autoencoder, text_source, tokenizer])
    on_part = on_part or (lambda part: None)
    transformer = load_transformer(local, use_ema=use_ema, dtype=dtype, variant=variant, **overrides)
    own_dtype, heads = transformer.head.weight.dtype, transformer.config.num_cross_heads
    on_part(transformer)
    in_it = None if controlnet or companions.controlnet else in_one_file(local)
    controlnet = controlnet or companions.controlnet or in_it
    if isinstance(controlnet, str | Path):
        averaged = use_ema and in_it is not None
        controlnet = load_controlnet(controlnet, dtype=dtype, num_cross_heads=heads, variant=variant, use_ema=averaged)
    if controlnet is not None:
        on_part(controlnet.to(own_dtype))
    loaded_autoencoder = load_autoencoder(autoencoder, dtype=dtype, variant=variant)
    on_part(loaded_autoencoder)
    loaded_text_encoder = _load_text_encoder(text_source, tokenizer, companions.prompts, dtype=dtype, variant=variant)
    on_part(loaded_text_encoder)
    return PipelineParts(
        transformer=transformer,
        controlnet=controlnet,
        autoencoder=loaded_autoencoder,
        text_encoder=loaded_text_encoder,
        flow_shift=companions.flow_shift if flow_shift is None else flow_shift,
    )


def _load_text_encoder(
    source: str, tokenizer: str | None, prompts: TextEncoderConfig, *, dtype: torch.dtype | None, variant: str | None
) -> TextEncoder:
    """Load the text encoder of a pipeline. In place of float16 it gets bfloat16, and a model id on the hub has no variant."""
    dtype, folder = torch.bfloat16 if dtype is torch.float16 else dtype, Path(source)
    found = find_variant(folder, variant=variant, dtype=dtype) if folder.is_dir() else None
    return load_text_encoder(source, config=prompts, dtype=dtype, tokenizer_path=tokenizer, variant=found)


def in_one_file(path: Path) -> Path | None:
    """The file of NVlabs, `path` or the only one in it, that holds a ControlNet with its transformer; None if there is none."""
    file = path if path.is_file() else None
    if path.is_dir() and not any((path / name).exists() for name in (*PIPELINE_INDEXES, "config.json")):
        file = find_pth(path)
    return file if file is not None and holds_controlnet(file) else None


def _check_parts(folder: Path, parts: Iterable[str | None]) -> None:
    """Raise FileNotFoundError that names the parts which should lie in a pipeline's folder, and do not."""
    missing = [part for part in parts if part is not None and Path(part).parent == folder and not Path(part).is_dir()]
    if missing:
        names = ", ".join(f"{Path(part).name}/" for part in missing)
        raise FileNotFoundError(f"{folder} has no {names}: the pipeline is incomplete; copy or download all of its folder")


def save_parts(parts: PipelineParts, path: str | Path, *, layout: str = "sana") -> None:
    """Write our folder ("sana"), a folder for diffusers' `SanaPipeline` ("diffusers"), or the transformer's `.pth` ("nvlabs").

    A `.pth` carries the null caption's embeddings, which NVlabs' training puts in place of dropped captions: they are computed
    here if the transformer came without. diffusers has no place for our instruction text: it prompts with its own.

    Raises ValueError for another layout or a URI.
    """
    folder = local_target(path)
    for model in (parts.transformer, parts.text_encoder):
        note_precision(model, check_layout(layout))
    if layout == "nvlabs":
        null_caption = parts.text_encoder.encode_padded("", parts.text_encoder.config.max_tokens)
        if parts.controlnet is None:
            save_transformer(parts.transformer, folder, layout=layout, null_caption_embeds=null_caption)
        else:
            save_controlnet(
                parts.controlnet, folder, layout=layout, transformer=parts.transformer, null_caption_embeds=null_caption
            )
        return
    for index in PIPELINE_INDEXES:  # written last: a save that is cut short, or in another layout, leaves no old pipeline
        (folder / index).unlink(missing_ok=True)
    save_transformer(parts.transformer, folder / "transformer", layout=layout)
    if parts.controlnet is not None:
        save_controlnet(parts.controlnet, folder / "controlnet", layout=layout)
    else:  # of another pipeline that was saved here before
        (folder / "controlnet" / "config.json").unlink(missing_ok=True)
    if layout == "diffusers":
        _save_diffusers_companions(parts, folder)
        return
    save_autoencoder(parts.autoencoder, folder / "autoencoder")
    save_text_encoder(parts.text_encoder, folder / "text_encoder")
    prompts = asdict(parts.text_encoder.config)
    settings = {"model_type": "sana_pipeline", "flow_shift": parts.flow_shift, "prompts": prompts}
    write_json(folder / "pipeline.json", settings)


def _save_diffusers_companions(parts: PipelineParts, folder: Path) -> None:
    """Write all but the transformer as `SanaPipeline` expects it, its index last."""
    save_autoencoder(parts.autoencoder, folder / "vae", layout="diffusers")
    model, tokenizer = parts.text_encoder.model, parts.text_encoder.tokenizer
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    sprints = parts.transformer.config.guidance_embeds
    scheduler_class = "SCMScheduler" if sprints else "DPMSolverMultistepScheduler"
    scheduler: dict[str, Any] = {
        "_class_name": scheduler_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": parts.flow_shift,
    }
    if sprints:
        scheduler = {"_class_name": scheduler_class, "_diffusers_version": DIFFUSERS_VERSION, "sigma_data": 0.5}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "SanaSprintPipeline" if sprints else "SanaPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", type(model).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    if parts.controlnet is not None:
        index |= {"_class_name": "SanaControlNetPipeline", "controlnet": ["diffusers", "SanaControlNetModel"]}
    write_json(folder / "model_index.json", index)
