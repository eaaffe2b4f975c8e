"""Tiny models for every metric, written into folders, and the settings of each metric that reads them."""

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Dinov2Config, Dinov2Model, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from pipelines.evaluate.config import ClipScoreConfig, ShapesJudgeConfig
from pipelines.evaluate.dpg.config import DpgConfig
from pipelines.evaluate.feature_config import CmmdConfig, DinoConfig, InceptionConfig
from pipelines.evaluate.geneval.config import GenEvalConfig
from pipelines.evaluate.inception_v3 import InceptionV3
from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.preference.config import AestheticConfig, HpsConfig, ImageRewardConfig, PickScoreConfig
from pipelines.evaluate.reconstruction_config import ReconstructionConfig
from pipelines.shapes.scenes import COLORS, SHAPES
from tests.support import preference_world as world

GENEVAL_LABELS = (*SHAPES, "pottedplant")
DPG_HEADER = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes, see `preference_world.fill`."""
    return {name: torch.from_numpy(values) for name, values in world.fill(shapes).items()}


def write_bert(folder: Path) -> str:
    """The tokenizer of a tiny BERT; returns the folder."""
    folder.mkdir(exist_ok=True)
    folder.joinpath("vocab.txt").write_text("\n".join(world.BERT_VOCABULARY) + "\n")
    folder.joinpath("tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    return str(folder)


def write_clip(folder: Path) -> str:
    """A tiny CLIP of transformers with a tokenizer of words; returns the folder."""
    folder.mkdir(exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(world.CLIP_VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    told |= {"unk_token": "<unk>", "model_max_length": world.CLIP_LENGTH}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(told))
    size = {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": world.IMAGE_SIZE}, "crop_size": size}
    folder.joinpath("preprocessor_config.json").write_text(json.dumps(images))
    folder.joinpath("processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    folder.joinpath("config.json").write_text(json.dumps({"architectures": ["CLIPModel"], **world.TRANSFORMERS_CLIP}))
    save_file(tensors(world.transformers_clip_shapes()), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def write_detector(folder: Path) -> str:
    """A tiny Mask2Former with random weights, whose classes are sure enough of themselves; returns the folder."""
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=7,
        id2label=dict(enumerate(GENEVAL_LABELS)),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(20)
    model.save_pretrained(folder)
    return str(folder)


def inception_weights() -> dict[str, torch.Tensor]:
    """Weights of Inception whose activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    weights = InceptionV3().state_dict()
    for name, weight in weights.items():
        if name.endswith("conv.weight"):
            weights[name] = torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5
        elif name.endswith(("bn.bias", "running_mean")):
            weights[name] = torch.randn(weight.shape, generator=generator) * 0.1
    return weights


def write_questions(path: Path, prompts: list[str]) -> str:
    """DPG-Bench's questions about these prompts, two each, the second of which depends on the first; returns the path."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(DPG_HEADER)
        for item, prompt in enumerate(dict.fromkeys(prompts)):
            for number in (1, 2):
                writer.writerow([f"item{item}", prompt, number, number - 1, "entity - whole (it)", f"Is it {prompt}?"])
    return str(path)


def tiny_metric(name: str, folder: Path, prompts: list[str]) -> MetricConfig:
    """Settings of a metric with tiny models, which are written into the folder.

    Args:
        prompts: of the pictures, for the metric that needs to know them.
    """
    own = {"batch_size": 2, "prepare_threads": 1, "max_reject_share": 0.5}
    if name == "inception":
        torch.save(inception_weights(), folder / "inception.pth")
        return InceptionConfig(model=str(folder / "inception.pth"), size=64, **own)  # type: ignore[arg-type]
    if name == "dino":
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 28}
        Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder / "dino")
        return DinoConfig(model=str(folder / "dino"), **own)  # type: ignore[arg-type]
    if name == "reconstruction":
        return ReconstructionConfig(model="zoo://pipeline/autoencoder", size=64, perceptual="zoo://clip", **own)  # type: ignore[arg-type]
    if name == "geneval":
        detector = write_detector(folder / "detector")
        return GenEvalConfig(model=detector, clip="zoo://clip", short_side=64, colors=tuple(COLORS), **own)  # type: ignore[arg-type]
    if name == "dpg":
        questions = write_questions(folder / "dpg_bench.csv", prompts)
        return DpgConfig(model="zoo://captioner-a", dtype="float32", questions=questions, **own)  # type: ignore[arg-type]
    if name == "image_reward":
        torch.save(tensors(world.image_reward_shapes()), folder / "ImageReward.pt")
        tokenizer = write_bert(folder / "bert")
        return ImageRewardConfig(model=str(folder / "ImageReward.pt"), tokenizer=tokenizer, **own)  # type: ignore[arg-type]
    if name == "hps":
        torch.save({"state_dict": tensors(world.open_clip_shapes())}, folder / "HPS.pt")
        return HpsConfig(model=str(folder / "HPS.pt"), processor=write_clip(folder / "clip"), **own)  # type: ignore[arg-type]
    if name == "pick_score":
        clip = write_clip(folder / "clip")
        return PickScoreConfig(model=clip, processor=clip, **own)  # type: ignore[arg-type]
    if name == "aesthetic":
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, folder / "head.pth")
        return AestheticConfig(model=write_clip(folder / "clip"), head=str(folder / "head.pth"), **own)  # type: ignore[arg-type]
    judged_by_clip = {"clip_score": ClipScoreConfig, "cmmd": CmmdConfig, "shapes": ShapesJudgeConfig}
    return judged_by_clip[name](model="zoo://clip", **own)  # type: ignore[arg-type]
