"""Losses on features of a vision model: how its images are normalized."""

from pathlib import Path

import pytest
from transformers import CLIPImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from pipelines.train_autoencoder.config import PerceptualConfig
from pipelines.train_autoencoder.perceptual import FeatureDistance


def test_images_are_normalized_as_the_model_s_image_processor_says(tmp_path: Path) -> None:
    shape = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    SiglipVisionModel(shape).save_pretrained(tmp_path)
    config = PerceptualConfig(model=str(tmp_path))
    with pytest.raises(ValueError, match="has no image processor"):
        FeatureDistance(config)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    distance = FeatureDistance(config)
    assert distance.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert distance.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
