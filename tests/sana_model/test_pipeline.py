import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AUTOENCODER_PRESETS, NVLABS_PROMPTS
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.peers import FAMILIES, TINY, diffusers_autoencoder, diffusers_transformer, scramble
from tests.support.tiny_gemma import tiny_gemma

PROMPTS = ["A small red circle", "two Blue squares left of a large green ring, on a dark background, seen from above"]
SIZE = {"height": 128, "width": 192}


@pytest.fixture(scope="module")
def gemma():
    return tiny_gemma(hidden=TINY.caption_dim)


@pytest.fixture(scope="module")
def diffusers_folder(gemma, tmp_path_factory):
    """A tiny SanaPipeline as diffusers saves it, with an f32 autoencoder."""
    folder = tmp_path_factory.mktemp("diffusers")
    model, tokenizer = gemma
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=model,
        vae=diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]),
        transformer=diffusers_transformer(TINY),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(diffusers_folder):
    pipeline = SanaPipeline.from_pretrained(diffusers_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(diffusers_folder):
    return TextToImage.from_pretrained(diffusers_folder)


def largest_difference(left, right) -> int:
    return max(
        int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in zip(left, right, strict=True)
    )


def run_theirs(pipeline, prompts=PROMPTS, **options):
    generator = torch.Generator().manual_seed(7)
    defaults = {"guidance_scale": 4.5, "num_inference_steps": 20, **SIZE}
    return pipeline(prompts, generator=generator, use_resolution_binning=False, **(defaults | options)).images


def assert_a_picture(images) -> None:
    assert all(np.asarray(image).std() > 10 for image in images), "an all but flat image compares equal to anything flat"


def test_images_equal_diffusers_pipeline(ours, theirs):
    wanted = run_theirs(theirs)
    images = ours(PROMPTS, **SIZE, generator=torch.Generator().manual_seed(7))
    assert_a_picture(wanted)
    assert [image.size for image in images] == [(192, 128)] * 2
    assert largest_difference(images, wanted) <= 2


def test_latents_after_20_steps_equal_diffusers(ours, theirs):
    wanted = run_theirs(theirs, output_type="latent")
    seen = {}
    ours(
        PROMPTS,
        **SIZE,
        generator=torch.Generator().manual_seed(7),
        on_step=lambda step, latents: seen.update({step: latents.clone()}),
    )
    assert sorted(seen) == list(range(20))
    assert (seen[19] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_negative_prompt_and_no_guidance_equal_diffusers(ours, theirs):
    for options in ({"negative_prompt": "blurred, Dark"}, {"guidance_scale": 1.0}):
        wanted = run_theirs(theirs, num_inference_steps=4, **options)
        images = ours(PROMPTS, **SIZE, generator=torch.Generator().manual_seed(7), num_steps=4, **options)
        assert_a_picture(wanted)
        assert largest_difference(images, wanted) <= 2


def test_flow_euler_equals_diffusers(diffusers_folder):
    """diffusers gives fractions of timesteps to the model with this scheduler, which NVlabs' code never does."""
    ours = TextToImage.from_pretrained(diffusers_folder, time_input="continuous")
    pipeline = SanaPipeline.from_pretrained(diffusers_folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.set_progress_bar_config(disable=True)
    wanted = run_theirs(pipeline, num_inference_steps=8)
    images = ours(PROMPTS, **SIZE, generator=torch.Generator().manual_seed(7), num_steps=8, solver="flow_euler")
    assert_a_picture(wanted)
    assert largest_difference(images, wanted) <= 2


def test_diffusers_loads_the_pipeline_that_we_save(ours, theirs, tmp_path):
    ours.save_pretrained(tmp_path, layout="diffusers")
    again = SanaPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert largest_difference(run_theirs(again, num_inference_steps=3), run_theirs(theirs, num_inference_steps=3)) == 0


def test_a_seed_means_the_same_image_in_any_batch(ours):
    draw = {"num_steps": 4, **SIZE}
    together = ours(PROMPTS, seed=3, **draw)
    alone = [ours([prompt], seed=3, **draw)[0] for prompt in PROMPTS]
    assert_a_picture(together)
    assert largest_difference(together, alone) <= 1
    listed = ours([PROMPTS[0]] * 2, seed=[3, 4], **draw)
    assert largest_difference(listed[:1], together[:1]) <= 1
    assert largest_difference(listed[1:], together[:1]) > 20


def test_captions_are_encoded_once_for_all_steps(ours, monkeypatch):
    calls = []
    original = ours.transformer.encode_captions
    monkeypatch.setattr(ours.transformer, "encode_captions", lambda *a: (calls.append(1), original(*a))[1])
    projections = []
    hook = ours.transformer.caption_proj.register_forward_hook(lambda *_: projections.append(1))
    ours(PROMPTS, num_steps=5, seed=0, **SIZE)
    hook.remove()
    assert len(calls) == 1 and len(projections) == 2  # the null caption and the prompts


def test_guidance_interval_runs_the_half_batch_outside(ours):
    sizes = []
    hook = ours.transformer.patch_embed.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    ours(PROMPTS, num_steps=6, seed=0, guidance_interval=(0.3, 0.9), **SIZE)
    hook.remove()
    assert set(sizes) == {2, 4} and len(sizes) == 6


def test_a_large_image_is_decoded_in_tiles(monkeypatch, gemma):
    model, tokenizer = gemma
    pipeline = TextToImage(
        scramble(SanaTransformer(TINY)),
        scramble(DCAutoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"])),
        TextEncoder(model, tokenizer, NVLABS_PROMPTS),
    )
    monkeypatch.setattr("sana_model.pictures.MAX_DECODE_PIXELS", 128 * 128)
    monkeypatch.setattr("sana_model.pictures.DECODE_TILE", 128)
    heights = []
    pipeline.autoencoder.decoder.register_forward_hook(lambda module, inputs, output: heights.append(output.shape[-1]))
    image = pipeline(["a"], 256, 320, num_steps=1, seed=0)[0]
    assert image.size == (320, 256) and set(heights) == {128} and len(heights) > 4


def test_bad_input_is_named(ours):
    cases = [
        (lambda: ours([], **SIZE), ValueError, "captions=\\[\\] is empty"),
        (lambda: ours("a cat", **SIZE), TypeError, "must be a list of str"),
        (lambda: ours(["a", 3], **SIZE), TypeError, r"captions\[1\]=3"),
        (lambda: ours(["a"], 100, 128), ValueError, "height=100 must be a positive multiple of 32; the nearest is 96"),
        (lambda: ours(["a"], 128, 0), ValueError, "width=0"),
        (lambda: ours(["a"], solver="ddim", **SIZE), ValueError, "unknown solver 'ddim'.*flow_euler"),
        (lambda: ours(["a"], num_steps=0, **SIZE), ValueError, "num_steps=0"),
        (lambda: ours(["a", "b"], seed=[1], **SIZE), ValueError, "1 seeds came with 2 prompts"),
        (lambda: ours(["a"], seed=1, generator=torch.Generator(), **SIZE), ValueError, "give one of them"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_parts_that_do_not_belong_together_are_refused(gemma):
    encoder = TextEncoder(*gemma, NVLABS_PROMPTS)
    with pytest.raises(ValueError, match=r"8 latent channels.*makes 32"):
        with torch.device("meta"):
            autoencoder = DCAutoencoder(AUTOENCODER_PRESETS["dc-ae-f32c32-sana-1.1"])
        TextToImage(SanaTransformer(TINY), autoencoder, encoder)
