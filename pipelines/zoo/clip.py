"""A tiny CLIP, trained with hard negatives. It scores captions and judges attributes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from pipelines.shapes.grammar import phrasings, sample_caption, write_caption
from pipelines.shapes.scenes import BACKGROUNDS, POSITIONS, RELATIONS, SHAPES, SIZES, VALUES, Scene, hard_negatives, regrouped
from pipelines.zoo.config import TinyClipConfig
from pipelines.zoo.training import fit
from pipelines.zoo.world import HELD_OUT, World, load_world, word_tokenizer

WIDTH = 128
MAX_TOKENS = 77
NUM_NEGATIVES = 3  # wrong captions for each image of a batch
SHORT_SHARE = 0.15  # of the captions leave attributes out
VISION_SHARE = 0.35  # of the training, at its start, learns attributes only: without text, it sees twice the images a second
ATTRIBUTE_WEIGHT = 0.3  # weight of the attribute loss after that
HEAD_SCALE = 10.0  # factor on unit vectors, so that the classifiers' probabilities can come near 1


def make_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Make an untrained CLIP for 64-px images: 8-px patches, 4 vision and 3 text layers, WIDTH wide."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": WIDTH // 32, "projection_dim": WIDTH}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        vision_config={**tower, "image_size": 64, "patch_size": 8, "num_hidden_layers": 4},
        text_config={
            **tower,
            **ids,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 3,
            "max_position_embeddings": MAX_TOKENS,
        },
        projection_dim=WIDTH,
    )
    return CLIPModel(config)


def clip_image_processor() -> CLIPImageProcessorPil:
    """Resizes an image so that its shorter side has 64 px, crops its center to 64 x 64, and scales pixels to [-1, 1]."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar, with <s> and </s> around each text."""
    return word_tokenizer(eos=True, model_max_length=MAX_TOKENS)


def train_clip(config: TinyClipConfig) -> dict[str, float]:
    """Train on the Shapes world and write model, tokenizer and image processor. Returns the last figures of `fit`."""
    loop, init_dir, cache_dir = config.loop, config.init_dir, config.cache_dir
    torch.set_num_threads(loop.num_threads)
    torch.manual_seed(loop.seed)
    tokenizer = clip_tokenizer()
    if init_dir:
        model = CLIPModel.from_pretrained(init_dir, dtype=torch.float32, trust_remote_code=False)
    else:
        model = make_clip(tokenizer)
    model.set_attn_implementation("eager")  # on a CPU the backward of fused attention takes longer than all the rest
    heads = AttributeHeads(model.visual_projection.out_features)
    world = load_world(cache_dir=cache_dir)
    held_out = load_world(500, first=HELD_OUT, cache_dir=cache_dir)

    def compute_loss(rows: np.ndarray, rng: np.random.Generator, progress: float) -> Tensor:
        images = embed_images(model, augment(world.images_as_tensor(rows), rng))
        scenes = [world.scenes[row] for row in rows]
        attributes = heads.loss(images, scenes)
        if init_dir is None and progress < VISION_SHARE:
            return attributes
        return contrast(model, tokenizer, images, scenes, rng) + ATTRIBUTE_WEIGHT * attributes

    def save() -> None:
        save_clip(model, tokenizer, config.output_dir)

    return fit(
        [*model.parameters(), *heads.parameters()],
        compute_loss,
        num_rows=len(world.scenes),
        config=loop,
        save=save,
        evaluate=lambda: measure_clip(model, tokenizer, held_out),
    )


def contrast(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, images: Tensor, scenes: list[Scene], rng: np.random.Generator
) -> Tensor:
    """CLIP's contrastive loss, in nats, with NUM_NEGATIVES wrong captions for each scene besides those of the batch.

    `images` are unit vectors (B, D). Images choose among all captions; captions choose among the images.
    """
    captions, wrong = [], []
    for scene in scenes:
        seed = int(rng.integers(2**31))
        # The same draws give a wrong scene the same phrasing, so that only what it says differs.
        captions.append(sample_caption(scene, np.random.default_rng(seed), short_share=SHORT_SHARE))
        negatives = hard_negatives(scene, rng, NUM_NEGATIVES)
        if others := regrouped(scene):  # the hardest ones, which a random choice seldom finds
            negatives[0] = others[rng.integers(len(others))]
        wrong += [sample_caption(other, np.random.default_rng(seed), short_share=SHORT_SHARE) for other in negatives]
    texts = embed_texts(model, tokenizer, captions + wrong)
    logits = (images @ texts.T).float() * model.logit_scale.exp().clamp(max=100)
    targets = torch.arange(len(scenes))
    same = np.array(captions)[:, None] == np.array(captions + wrong)[None]  # short captions repeat
    same[targets, targets] = False
    logits = logits.masked_fill(torch.from_numpy(same), -1e4)
    return 0.7 * F.cross_entropy(logits, targets) + 0.3 * F.cross_entropy(logits[:, : len(scenes)].T, targets)


class AttributeHeads(nn.Module):
    """Linear classifiers of every attribute on an image's unit vector. They only help the training, and are not saved."""

    def __init__(self, width: int):
        super().__init__()
        sizes = {"background": BACKGROUNDS, "size": SIZES, "position": POSITIONS, "relation": RELATIONS}
        sizes |= {f"{name}{index}": VALUES[name] for name in ("shape", "color", "fill") for index in (0, 1)}
        self.values = {name: list(values) for name, values in sizes.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in sizes.items()})

    def loss(self, images: Tensor, scenes: list[Scene]) -> Tensor:
        """Mean cross-entropy, in nats, over the attributes that the scenes have; `images` are unit vectors (B, D)."""
        losses = []
        for name, head in self.heads.items():
            values = [self._value(scene, name) for scene in scenes]
            targets = torch.tensor([-100 if value is None else self.values[name].index(value) for value in values])
            if (targets >= 0).any():
                losses.append(F.cross_entropy(head(images * HEAD_SCALE).float(), targets))
        return torch.stack(losses).mean()

    def _value(self, scene: Scene, name: str) -> str | None:
        if name in ("background", "size", "position", "relation"):
            return getattr(scene, name)
        index = int(name[-1])
        return getattr(scene.things[index], name[:-1]) if index < len(scene.things) else None


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur about half of the images (B, 3, H, W) and add noise to all, so that scores do not depend on sharp edges."""
    blurred = F.interpolate(F.interpolate(images, scale_factor=0.5, mode="area"), scale_factor=2, mode="bilinear")
    weight = torch.from_numpy(rng.uniform(0, 1, (len(images), 1, 1, 1)) * (rng.random((len(images), 1, 1, 1)) < 0.5)).float()
    noise = torch.from_numpy(rng.normal(0, 1, images.shape)).float() * float(rng.uniform(0, 0.15))
    return images + weight * (blurred - images) + noise


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Embed images (B, 3, 64, 64) in [-1, 1] as unit vectors (B, D)."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=images).pooler_output), dim=-1)


def embed_texts(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Embed captions as unit vectors (B, D)."""
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(model.text_projection(hidden), dim=-1)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, output_dir: str | Path) -> None:
    """Write model, in bfloat16, tokenizer and image processor."""
    weights = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    model.save_pretrained(output_dir, state_dict=weights)
    CLIPProcessor(clip_image_processor(), tokenizer).save_pretrained(output_dir)


@torch.no_grad()
def measure_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, float]:
    """How often the right caption gets the highest score.

    Returns the share of images whose caption wins against those of 9 hard negatives (`hard_negatives`), the same among images
    of two objects (`pair_hard_negatives`), and the share of one-object images whose shape wins against the others (`shape`).
    """
    model.eval()
    rng = np.random.default_rng(1)
    right, right_pairs, right_shapes = [], [], []
    images = embed_images(model, world.images_as_tensor(slice(None)))
    for scene, image in zip(world.scenes, images, strict=True):
        phrasing = phrasings(scene)[rng.integers(4)]
        rivals = [scene, *hard_negatives(scene, rng, 9)]
        won = best_caption(model, tokenizer, image, [write_caption(rival, phrasing) for rival in rivals]) == 0
        right.append(won)
        if scene.relation is not None:
            right_pairs.append(won)
        else:
            shapes = [write_caption(with_shape(scene, shape), "a {color} {shape}") for shape in SHAPES]
            right_shapes.append(best_caption(model, tokenizer, image, shapes) == SHAPES.index(scene.things[0].shape))
    model.train()
    return {
        "hard_negatives": float(np.mean(right)),
        "pair_hard_negatives": float(np.mean(right_pairs)),
        "shape": float(np.mean(right_shapes)),
    }


def with_shape(scene: Scene, shape: str) -> Scene:
    """A copy of a scene whose first object has another shape."""
    return replace(scene, things=(replace(scene.things[0], shape=shape),))


def best_caption(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, image: Tensor, captions: list[str]) -> int:
    """The index of the caption with the highest score; `image` is a unit vector (D,)."""
    return int((embed_texts(model, tokenizer, captions) @ image).argmax())
