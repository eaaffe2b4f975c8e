"""A whole pipeline on disk: what is found in a folder, and what comes back from each layout."""

import numpy as np
import pytest
import torch

from sana_model.files.pipeline import Companions, find_companions
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DIFFUSERS_PROMPTS, NVLABS_PROMPTS, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.peers import FAMILIES, TINY, scramble
from tests.support.tiny_gemma import tiny_gemma


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return TextToImage(
        scramble(SanaTransformer(TINY)),
        scramble(DCAutoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"])),
        TextEncoder(*tiny_gemma(hidden=TINY.caption_dim), DIFFUSERS_PROMPTS),
        flow_shift=4.0,
    )


def test_companions_are_those_of_the_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    ours, diffusers = str(tmp_path / "ours"), str(tmp_path / "diffusers")
    assert find_companions(tmp_path / "ours") == Companions(
        autoencoder=f"{ours}/autoencoder", text_encoder=f"{ours}/text_encoder", prompts=DIFFUSERS_PROMPTS, flow_shift=4.0
    )
    assert find_companions(tmp_path / "diffusers") == Companions(
        autoencoder=f"{diffusers}/vae",
        text_encoder=f"{diffusers}/text_encoder",
        tokenizer=f"{diffusers}/tokenizer",
        prompts=DIFFUSERS_PROMPTS,
        flow_shift=4.0,
    )


def test_weights_that_name_no_companions_get_the_published_ones(tmp_path):
    (tmp_path / "model.pth").touch()
    assert find_companions(tmp_path / "model.pth") == find_companions(None) == Companions()
    assert Companions().prompts == NVLABS_PROMPTS == TextEncoderConfig()


def test_a_folder_that_is_no_pipeline_is_refused(pipeline, tmp_path):
    pipeline.transformer.save_pretrained(tmp_path)
    for find in (find_companions, TextToImage.from_pretrained):
        with pytest.raises(ValueError, match=r"is no pipeline: it has neither pipeline\.json"):
            find(tmp_path)


def test_our_own_folder_round_trips(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    assert again.text_encoder.config == DIFFUSERS_PROMPTS and again.flow_shift == pipeline.flow_shift
    wanted, found = (np.asarray(model(["a red circle"], 64, 96, num_steps=3, seed=1)[0]) for model in (pipeline, again))
    assert wanted.std() > 10 and np.array_equal(found, wanted)


@pytest.mark.parametrize(("first", "second"), [("sana", "diffusers"), ("diffusers", "sana")])
def test_a_pipeline_saved_over_another_layout_is_the_new_one(pipeline, first, second, tmp_path):
    pipeline.save_pretrained(tmp_path, layout=first)
    changed = TextToImage.from_pretrained(tmp_path, flow_shift=5.0)
    with torch.no_grad():
        changed.autoencoder.decoder.conv_in.weight.mul_(1.5)
    changed.save_pretrained(tmp_path, layout=second)
    again = TextToImage.from_pretrained(tmp_path)
    assert again.flow_shift == 5.0
    assert torch.equal(again.autoencoder.decoder.conv_in.weight, changed.autoencoder.decoder.conv_in.weight)
    with pytest.raises(ValueError, match="unknown layout 'gguf'"):
        again.save_pretrained(tmp_path, layout="gguf")
    assert TextToImage.from_pretrained(tmp_path).flow_shift == 5.0, "a refused save must leave the pipeline"
    with pytest.raises(ValueError, match="holds a whole pipeline"):
        again.transformer.save_pretrained(tmp_path)


def test_nvlabs_file_carries_the_null_caption_and_loads_with_the_other_parts(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "sana")
    pipeline.save_pretrained(tmp_path / "model.pth", layout="nvlabs")
    embedding = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]["y_embedder.y_embedding"]
    model, tokenizer = pipeline.text_encoder.model, pipeline.text_encoder.tokenizer
    tokens = tokenizer("", max_length=300, padding="max_length", truncation=True, return_tensors="pt")  # as in NVlabs' code
    with torch.no_grad():
        states = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    assert torch.equal(embedding, states) and embedding.any(dim=1).all() and tokens.attention_mask.sum() == 1
    assert pipeline.transformer.null_caption_embeds is None
    again = TextToImage.from_pretrained(
        tmp_path / "model.pth",
        autoencoder=tmp_path / "sana" / "autoencoder",
        text_encoder=tmp_path / "sana" / "text_encoder",
        flow_shift=2.0,
    )
    assert again.flow_shift == 2.0 and again.text_encoder.config == NVLABS_PROMPTS
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], tensor)
