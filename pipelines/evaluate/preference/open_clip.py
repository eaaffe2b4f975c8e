"""CLIP checkpoints of open_clip, such as HPSv2's, as a CLIP of transformers: every tensor by another name."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from pipelines.workers.clip import ClipModel, PreparedImage
from pipelines.workers.models import pretrained
from sana_model.files.places import resolve
from sana_model.files.tensors import read_weights_file

VISION_HEAD_WIDTH = 80  # of ViT-H-14; the weights do not tell
TEXT_HEAD_WIDTH = 64
EXACT = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


class OpenClip(ClipModel):
    """A CLIP ViT-H-14 of open_clip with HPSv2's way of reading pictures.

    Args:
        model: the file of weights: a path, an hf:// or an fsspec URI.
        tokenizer: a local folder or hub id, and its revision.
    """

    def __init__(self, model: str, tokenizer: tuple[str, str | None], *, dtype: str = "float32", device: str | None = None):
        path, options = pretrained(*tokenizer)
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        clip: Any = load_open_clip(resolve(model), end_token=loaded.eos_token_id)
        self.size: int = clip.config.vision_config.image_size
        self._take(model, clip.to(dtype=getattr(torch, dtype)), loaded, device)

    def prepare_image(self, image: Image.Image) -> PreparedImage:
        """Scale an RGB picture by its longer side, with anti-aliasing, pad it with black to a square, and normalize."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        scale = self.size / max(image.size)
        if scale != 1:
            height, width = round(image.height * scale), round(image.width * scale)
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
            top, left = (self.size - height) // 2, (self.size - width) // 2
            pixels = F.pad(pixels, (left, self.size - width - left, top, self.size - height - top))
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        return {"pixel_values": (pixels - mean) / std}


def load_open_clip(path: Path, *, end_token: int) -> CLIPModel:
    """Read a CLIP ViT-H-14 of open_clip from a file of torch.save or safetensors.

    Args:
        end_token: the id that ends a text; the text's embedding is made from its state.

    Raises ValueError that names the file if it holds no such model.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in read_weights_file(path).items()}
    try:
        config = _config_of(state, end_token)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"{path} holds no CLIP of open_clip: there is no {error}") from error
    with torch.device("meta"):
        model = CLIPModel(config)
    renamed = dict(_rename(state))
    wanted = model.state_dict().keys()
    if wrong := sorted(wanted ^ renamed.keys()):
        raise ValueError(f"{path} holds no CLIP of open_clip that transformers knows: these differ: {', '.join(wrong[:5])}")
    model = CLIPModel(config)
    model.load_state_dict(renamed)
    return model


def _config_of(state: dict[str, Tensor], end_token: int) -> CLIPConfig:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["token_embedding.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _num_blocks(state, "visual.transformer."),
        "num_attention_heads": width // VISION_HEAD_WIDTH,
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _num_blocks(state, "transformer."),
        "num_attention_heads": text_width // TEXT_HEAD_WIDTH,
        "max_position_embeddings": len(state["positional_embedding"]),
        "hidden_act": "gelu",
        "eos_token_id": end_token,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])


def _num_blocks(state: dict[str, Tensor], prefix: str) -> int:
    numbers = [int(name.removeprefix(prefix).split(".")[1]) for name in state if name.startswith(f"{prefix}resblocks.")]
    return max(numbers) + 1


def _rename(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        norm, _, kind = name.rpartition(".")
        if name in EXACT:
            yield EXACT[name], tensor
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], tensor.T.contiguous()
        elif norm in NORMS:
            yield f"{NORMS[norm]}.{kind}", tensor
        elif match := BLOCK.fullmatch(name):
            tower, number, part, kind = match.groups()
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{layer}.self_attn.{letter}_proj.{kind}", third
            else:
                yield f"{layer}.{IN_BLOCK.get(part, part)}.{kind}", tensor
        elif name != "attn_mask":  # a buffer of older versions
            yield name, tensor
