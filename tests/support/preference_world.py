"""Tiny weights, pictures and prompts for preference scores, from formulas: no library's random numbers are in them.

The golden scores in `tests/pipelines/evaluate/golden/preference.json` are what the published code of ImageReward, HPSv2 and
PickScore gives for exactly these.
"""

import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

PROMPTS = ("a red cat", "two dogs left of a blue cup", "a photo of a red dog and a cat above a blue cup " * 4)
"""The last is longer than any of the models reads."""
WORDS = ("a", "red", "blue", "cat", "dog", "dogs", "two", "cup", "left", "of", "photo", "and", "above")
BERT_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
CLIP_VOCABULARY = ("<pad>", "<unk>", *WORDS, "<s>", "</s>")
"""The end has the highest id: open_clip finds it so."""
CLIP_LENGTH = 16
IMAGE_SIZE, PATCH = 32, 8


def pictures() -> list[Image.Image]:
    """RGB pictures: a square, a wide and a tall one."""
    made = []
    for number, (height, width) in enumerate([(48, 48), (40, 64), (90, 50)]):
        y, x = np.mgrid[:height, :width]
        channels = [127.5 + 120 * np.sin(x / (3 + channel + number) + y / (5 + 2 * channel)) for channel in range(3)]
        made.append(Image.fromarray(np.stack(channels, -1).astype(np.uint8)))
    return made


def fill(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights of these shapes: the sines of a count that begins elsewhere for each name."""
    weights = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        start = zlib.crc32(name.encode()) % 10_000
        values = 0.25 * np.sin(1.7 * np.arange(start, start + size, dtype=np.float64) ** 1.1)
        is_scale = name.endswith("weight") and any(part in name for part in ("norm", "ln_", "LayerNorm"))
        weights[name] = (values + is_scale).reshape(shape).astype(np.float32)
    return weights


def image_reward_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny ImageReward, as its checkpoint has them."""
    wide, narrow, inner = 128, 64, 96
    vision = "blip.visual_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, wide),
        f"{vision}pos_embed": (1, 1 + (IMAGE_SIZE // PATCH) ** 2, wide),
        **_linear(f"{vision}patch_embed.proj", wide, 3, PATCH, PATCH),
        **_norm(f"{vision}norm", wide),
    }
    for layer in range(2):
        block = f"{vision}blocks.{layer}."
        shapes |= _norm(f"{block}norm1", wide) | _norm(f"{block}norm2", wide)
        shapes |= _linear(f"{block}attn.qkv", 3 * wide, wide) | _linear(f"{block}attn.proj", wide, wide)
        shapes |= _linear(f"{block}mlp.fc1", 4 * wide, wide) | _linear(f"{block}mlp.fc2", wide, 4 * wide)
    text = "blip.text_encoder."
    shapes |= {
        f"{text}embeddings.word_embeddings.weight": (len(BERT_VOCABULARY), narrow),
        f"{text}embeddings.position_embeddings.weight": (48, narrow),
        **_norm(f"{text}embeddings.LayerNorm", narrow),
    }
    for layer in range(2):
        block = f"{text}encoder.layer.{layer}."
        for kind, source in (("attention", narrow), ("crossattention", wide)):
            shapes |= _linear(f"{block}{kind}.self.query", narrow, narrow)
            shapes |= _linear(f"{block}{kind}.self.key", narrow, source) | _linear(f"{block}{kind}.self.value", narrow, source)
            shapes |= _linear(f"{block}{kind}.output.dense", narrow, narrow) | _norm(f"{block}{kind}.output.LayerNorm", narrow)
        shapes |= _linear(f"{block}intermediate.dense", inner, narrow) | _linear(f"{block}output.dense", narrow, inner)
        shapes |= _norm(f"{block}output.LayerNorm", narrow)
    widths = (narrow, 1024, 128, 64, 16, 1)
    for place, number in enumerate((0, 2, 4, 6, 7)):
        shapes |= _linear(f"mlp.layers.{number}", widths[place + 1], widths[place])
    return shapes


def open_clip_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny ViT-H-14 of open_clip: heads 80 wide in the pictures' tower, 64 in the texts'."""
    wide, narrow, joint = 160, 128, 48
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (CLIP_LENGTH, narrow),
        "text_projection": (narrow, joint),
        "logit_scale": (),
        "token_embedding.weight": (len(CLIP_VOCABULARY), narrow),
        **_norm("ln_final", narrow),
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": (1 + (IMAGE_SIZE // PATCH) ** 2, wide),
        "visual.proj": (wide, joint),
        "visual.conv1.weight": (wide, 3, PATCH, PATCH),
        **_norm("visual.ln_pre", wide),
        **_norm("visual.ln_post", wide),
    }
    for tower, width in (("visual.", wide), ("", narrow)):
        for layer in range(2):
            block = f"{tower}transformer.resblocks.{layer}."
            shapes |= _norm(f"{block}ln_1", width) | _norm(f"{block}ln_2", width)
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            shapes |= _linear(f"{block}attn.out_proj", width, width)
            shapes |= _linear(f"{block}mlp.c_fc", 4 * width, width) | _linear(f"{block}mlp.c_proj", width, 4 * width)
    return shapes


def transformers_clip_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny CLIP of transformers, as published checkpoints such as PickScore's have them."""
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    tokens = {"token": len(CLIP_VOCABULARY), "position": CLIP_LENGTH}
    for tower, width, embeddings in (("vision", 64, {"position": 1 + (IMAGE_SIZE // PATCH) ** 2}), ("text", 32, tokens)):
        model = f"{tower}_model."
        shapes |= {f"{tower if tower == 'text' else 'visual'}_projection.weight": (24, width)}
        shapes |= {f"{model}embeddings.{name}_embedding.weight": (count, width) for name, count in embeddings.items()}
        for layer in range(2):
            block = f"{model}encoder.layers.{layer}."
            for letter in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _linear(f"{block}self_attn.{letter}", width, width)
            shapes |= _norm(f"{block}layer_norm1", width) | _norm(f"{block}layer_norm2", width)
            shapes |= _linear(f"{block}mlp.fc1", 2 * width, width) | _linear(f"{block}mlp.fc2", width, 2 * width)
    vision = "vision_model."
    shapes |= _norm("text_model.final_layer_norm", 32) | _norm(f"{vision}post_layernorm", 64)
    return shapes | {
        **_norm(f"{vision}pre_layrnorm", 64),
        f"{vision}embeddings.class_embedding": (64,),
        f"{vision}embeddings.patch_embedding.weight": (64, 3, PATCH, PATCH),
    }


TRANSFORMERS_CLIP = {
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "vocab_size": len(CLIP_VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": CLIP_LENGTH, "hidden_act": "gelu", "projection_dim": 24,
        "pad_token_id": 0, "bos_token_id": len(CLIP_VOCABULARY) - 2, "eos_token_id": len(CLIP_VOCABULARY) - 1,
    },
    "vision_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": IMAGE_SIZE, "patch_size": PATCH, "hidden_act": "gelu", "projection_dim": 24,
    },
}  # fmt: skip


def clip_tokens(prompt: str) -> list[int]:
    """The ids of a prompt as open_clip makes them: start, words, end; cut to CLIP_LENGTH with the end kept."""
    start, end = CLIP_VOCABULARY.index("<s>"), CLIP_VOCABULARY.index("</s>")
    words = [CLIP_VOCABULARY.index(word) for word in prompt.split()]
    return [start, *words[: CLIP_LENGTH - 2], end]


def _linear(name: str, out: int, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *shape), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
