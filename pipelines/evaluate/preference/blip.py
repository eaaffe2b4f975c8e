"""The model of ImageReward: BLIP's text encoder reads prompt and picture together, and five linear layers make a number of it.

Source: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation" (arXiv 2304.05977), and
the code published with it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from sana_model.files.tensors import read_weights_file

HEAD_WIDTH = 64  # of both encoders' attention; the weights do not tell
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # over the published model's training data
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 35
"""Of a prompt, with those that begin and end it; the rest is cut, as published."""
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|.*\.position_ids")
"""Tensors of BLIP's training, and numbers that are counted up anew."""


class ImageRewardModel(nn.Module):
    """Scores pictures: higher is better, 0 the mean over the training data and 1 its standard deviation."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, head_widths: list[int]):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        pairs = zip([text.hidden_size, *head_widths], head_widths, strict=False)
        self.head = nn.Sequential(*(nn.Linear(wide, narrow) for wide, narrow in pairs))
        self.image_size = int(vision.image_size)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Prepared pictures (B, 3, H, W), and their prompts' tokens and mask (B, MAX_TOKENS), to scores (B,)."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
        ).last_hidden_state
        return (self.head(states[:, 0])[:, 0].float() - REWARD_MEAN) / REWARD_STD

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Scale an RGB picture by its shorter side, cut out the middle and normalize: (3, size, size)."""
        size, short = self.image_size, min(image.size)
        width, height = (side * size // short for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        scaled = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]


def load_image_reward(path: Path) -> ImageRewardModel:
    """Read the published checkpoint, or one of the same form in other sizes. Raises ValueError that names the file."""
    state = read_weights_file(path)
    try:
        vision, text = _vision_config(state), _text_config(state)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"{path} holds no ImageReward: there is no {error}") from error
    numbers = sorted(int(name.split(".")[2]) for name in state if re.fullmatch(r"mlp\.layers\.\d+\.weight", name))
    model = ImageRewardModel(vision, text, [len(state[f"mlp.layers.{number}.weight"]) for number in numbers])
    renamed = dict(_rename(state, numbers))
    if wrong := sorted(model.state_dict().keys() ^ renamed.keys()):
        raise ValueError(f"{path} holds no ImageReward: these tensors are too many or missing: {', '.join(wrong[:5])}")
    model.load_state_dict(renamed)
    return model.eval()


def _vision_config(state: dict[str, Tensor]) -> BlipVisionConfig:
    prefix = "blip.visual_encoder."
    width, _, patch, _ = state[f"{prefix}patch_embed.proj.weight"].shape
    grid = round((state[f"{prefix}pos_embed"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{prefix}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_num_layers(state, f"{prefix}blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=grid * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(state: dict[str, Tensor]) -> BlipTextConfig:
    prefix = "blip.text_encoder."
    vocabulary, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state[f"{prefix}encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state[f"{prefix}encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_num_layers(state, f"{prefix}encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state[f"{prefix}embeddings.position_embeddings.weight"]),
    )


def _num_layers(state: dict[str, Tensor], prefix: str) -> int:
    return max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)) + 1


def _rename(state: dict[str, Tensor], head_layers: list[int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if UNUSED.fullmatch(name):
            continue
        if name.startswith("blip.visual_encoder."):
            yield f"vision.{_vision_name(name.removeprefix('blip.visual_encoder.'))}", tensor
        elif name.startswith("blip.text_encoder."):
            yield f"text.{name.removeprefix('blip.text_encoder.')}", tensor
        elif name.startswith("mlp.layers."):
            _, _, number, kind = name.split(".")
            yield f"head.{head_layers.index(int(number))}.{kind}", tensor
        else:
            yield name, tensor


def _vision_name(name: str) -> str:
    if name in VISION:
        return VISION[name]
    part, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", part):
        number, own = match.groups()
        return f"encoder.layers.{number}.{VISION.get(own, own)}.{kind}"
    return f"{VISION.get(part, part)}.{kind}"
