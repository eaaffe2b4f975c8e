"""ControlNet: against values of NVlabs' own code, against diffusers' pipeline in both directions, and what files keep of it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaControlNetModel, SanaControlNetPipeline
from PIL import Image

from sana_model.files.checkpoint import export
from sana_model.files.key_maps import CONTROLNET_NVLABS
from sana_model.flow import flow_loss, whole_sigmas
from sana_model.guidance import guided_velocity
from sana_model.nn.config import NVLABS_PROMPTS, ControlNetConfig, SanaConfig
from sana_model.nn.controlnet import Control, SanaControlNet
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer
from sana_model.pictures import encode_pictures
from sana_model.pipeline import TextToImage
from sana_model.solver import SOLVERS
from tests.support.golden import (
    CONTROLLED,
    CONTROLNET_VALUES,
    FLOW_SHIFT,
    GUIDANCE_SCALE,
    control_latents,
    golden,
    inputs,
    nvlabs_controlnet_weights,
    summary,
)
from tests.support.peers import (
    FAMILIES,
    TINY,
    assert_close,
    assert_same_tensors,
    diffusers_autoencoder,
    diffusers_transformer,
    scramble,
)
from tests.support.tiny_gemma import tiny_gemma

DEEP = replace(TINY, depth=4)
PROMPTS = ["A small red circle", "two Blue squares left of a large green ring, on a dark background, seen from above"]
SIZE = {"height": 128, "width": 192}


def control_config(form: str, base: SanaConfig = DEEP, depth: int = 2) -> ControlNetConfig:
    return ControlNetConfig(**{**asdict(base), "depth": depth, "form": form})


def control_picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIZE["width"], SIZE["height"]), Image.Resampling.NEAREST)


def difference(left: list[Image.Image], right: list[Image.Image]) -> int:
    pairs = zip(left, right, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVlabs' weights file of a transformer with its ControlNet."""
    path = tmp_path_factory.mktemp("nvlabs") / "Sana_ControlNet.pth"
    torch.save({"state_dict": nvlabs_controlnet_weights(CONTROLLED)}, path)
    return path


@torch.inference_mode()
@pytest.mark.parametrize(("name", "config"), [("plain", CONTROLLED), ("positions", replace(CONTROLLED, position_scale=1.0))])
def test_the_velocity_is_that_of_nvlabs_code(tmp_path: Path, name: str, config: SanaConfig) -> None:
    torch.save({"state_dict": nvlabs_controlnet_weights(config)}, tmp_path / "x.pth")
    transformer, controlnet = (
        SanaTransformer.from_pretrained(tmp_path / "x.pth"),
        SanaControlNet.from_pretrained(tmp_path / "x.pth"),
    )
    sample, timestep = inputs(), torch.tensor([599.64, 8.946])
    state = controlnet.prepare(transformer, control_latents(), sample.caption_embeds, sample.caption_mask)
    steered = controlnet.steer(sample.latents, timestep, state)
    arguments = (sample.latents, timestep, sample.caption_embeds, sample.caption_mask)
    found = transformer(*arguments, after_block=steered)
    assert_close(found, golden(f"forward.{name}", CONTROLNET_VALUES))
    assert (found - transformer(*arguments)).abs().max() > 0.1, "the control picture must count"


@torch.inference_mode()
def test_guided_sampling_is_that_of_nvlabs_code(pth: Path) -> None:
    transformer, controlnet = SanaTransformer.from_pretrained(pth), SanaControlNet.from_pretrained(pth)
    assert transformer.null_caption_embeds is not None
    sample = inputs()
    null = transformer.null_caption_embeds[:12].expand(2, -1, -1), sample.caption_mask
    captions = sample.caption_embeds, sample.caption_mask
    control = Control(controlnet, control_latents())
    velocity = guided_velocity(transformer, captions, null, guidance_scale=GUIDANCE_SCALE, control=control)
    solve, make_grid = SOLVERS["flow_dpm_solver"]
    assert_close(solve(velocity, sample.noise, make_grid(20, FLOW_SHIFT)), golden("dpm", CONTROLNET_VALUES))


def test_loss_and_gradients_are_those_of_nvlabs_code(pth: Path) -> None:
    """The transformer is frozen, the second sample's caption is dropped; steps 333 and 777 of the table."""
    transformer, controlnet = SanaTransformer.from_pretrained(pth), SanaControlNet.from_pretrained(pth)
    transformer.requires_grad_(False)
    sample, null = inputs(), transformer.null_caption_embeds
    assert null is not None

    def velocity(latents: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        state = controlnet.prepare(transformer, control_latents(), embeds, mask)
        return transformer(latents, timestep, embeds, mask, after_block=controlnet.steer(latents, timestep, state))

    embeds = torch.stack([sample.caption_embeds[0], null[: sample.caption_mask.shape[1]]])
    sigma = whole_sigmas(FLOW_SHIFT)[[333, 777]]
    loss = flow_loss(velocity, sample.latents, embeds, sample.caption_mask, sigma=sigma, noise=sample.noise)
    assert_close(loss.detach(), golden("training.loss", CONTROLNET_VALUES))
    loss.mean().backward()
    assert all(weight.grad is None for weight in transformer.parameters())
    gradients = {name: weight.grad for name, weight in controlnet.named_parameters() if weight.grad is not None}
    found, wanted = summary(export(gradients, CONTROLNET_NVLABS)), golden("training.gradients", CONTROLNET_VALUES)
    assert found.shape == wanted.shape
    worst = ((found - wanted).abs() / wanted[:, :1]).max()
    assert worst < 1e-4, f"a gradient differs by {worst:.1e} of its norm"


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SanaControlNetPipeline as diffusers saves it."""
    folder = tmp_path_factory.mktemp("diffusers")
    model, tokenizer = tiny_gemma(hidden=TINY.caption_dim)
    transformer = diffusers_transformer(DEEP)
    names = SanaControlNetModel.__init__.__wrapped__.__code__.co_varnames
    shape = {name: value for name, value in transformer.config.items() if name in names and name != "self"}
    SanaControlNetPipeline(
        tokenizer=tokenizer,
        text_encoder=model,
        vae=diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]),
        transformer=transformer,
        controlnet=scramble(SanaControlNetModel(**(shape | {"num_layers": 2})), 3),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ).save_pretrained(folder)
    return folder


def draw_theirs(folder: Path, **options: Any) -> list[Image.Image]:
    pipeline = SanaControlNetPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 4.5, "num_inference_steps": 6, "use_resolution_binning": False, **SIZE}
    generator = torch.Generator().manual_seed(7)
    control = [control_picture()] * len(PROMPTS)
    return pipeline(PROMPTS, control_image=control, generator=generator, **(settings | options)).images


def draw_ours(model: TextToImage, **options: Any) -> list[Image.Image]:
    settings = {"control_image": control_picture(), "num_steps": 6, "generator": torch.Generator().manual_seed(7)}
    return model(PROMPTS, **SIZE, **(settings | options))


def test_pictures_are_those_of_diffusers_in_both_directions(diffusers_folder: Path, tmp_path: Path) -> None:
    ours = TextToImage.from_pretrained(diffusers_folder)
    assert ours.controlnet is not None and ours.controlnet.config.form == "diffusers"
    for options, theirs in (
        ({}, {}),
        ({"control_scale": 0.5}, {"controlnet_conditioning_scale": 0.5}),
        ({"guidance_scale": 1.0},) * 2,
    ):
        drawn = draw_ours(ours, **options)
        assert min(np.asarray(image).std() for image in drawn) > 10
        assert difference(drawn, draw_theirs(diffusers_folder, **theirs)) <= 2
    assert difference(drawn, draw_ours(ours, control_image=None, guidance_scale=1.0)) > 20
    ours.save_pretrained(tmp_path, layout="diffusers")
    assert difference(draw_theirs(tmp_path), draw_theirs(diffusers_folder)) == 0


def make_pipeline(form: str) -> TextToImage:
    transformer = scramble(SanaTransformer(replace(DEEP, time_input="whole", null_caption="own_mask")))
    model = TextToImage(
        transformer,
        TextToImage.from_pretrained("zoo://pipeline").autoencoder,
        TextEncoder(*tiny_gemma(hidden=TINY.caption_dim), NVLABS_PROMPTS),
        controlnet=scramble(SanaControlNet(control_config(form, transformer.config)), 1),
    )
    return model


@pytest.mark.parametrize(
    ("form", "layout"), [("nvlabs", "sana"), ("nvlabs", "nvlabs"), ("diffusers", "sana"), ("diffusers", "diffusers")]
)
def test_files_keep_every_bit(form: str, layout: str, tmp_path: Path) -> None:
    model = make_pipeline(form)
    path = tmp_path / ("x.pth" if layout == "nvlabs" else "x")
    model.save_pretrained(path, layout=layout)
    assert model.controlnet is not None
    again = SanaControlNet.from_pretrained(path)
    assert again.config == model.controlnet.config
    assert_same_tensors(again.state_dict(), model.controlnet.state_dict())
    transformer = SanaTransformer.from_pretrained(path)
    assert transformer.config == model.transformer.config
    assert_same_tensors(transformer.state_dict(), model.transformer.state_dict())
    if layout == "sana":
        pipeline = TextToImage.from_pretrained(path)
        assert pipeline.controlnet is not None and pipeline.controlnet.config.form == form
        replace_by_none = TextToImage(model.transformer, model.autoencoder, model.text_encoder)
        replace_by_none.save_pretrained(path)
        assert TextToImage.from_pretrained(path).controlnet is None, "an older ControlNet must not stay"


def test_weights_of_nvlabs_in_diffusers_layout_keep_their_function(tmp_path: Path) -> None:
    """As diffusers' converter writes them: with copies of the transformer's embeddings."""
    model = make_pipeline("nvlabs")
    assert model.controlnet is not None
    converted = SanaControlNet(control_config("diffusers", model.transformer.config))
    converted.load_state_dict(model.transformer.state_dict() | model.controlnet.state_dict(), strict=False)
    converted.save_pretrained(tmp_path, layout="diffusers")
    again = SanaControlNet.from_pretrained(tmp_path, form="nvlabs")
    assert again.config == model.controlnet.config
    assert_same_tensors(again.state_dict(), model.controlnet.state_dict())
    settings = {"num_steps": 2, "seed": 1, "control_image": control_picture()}
    wanted = model(PROMPTS, **SIZE, **settings)
    model.controlnet = SanaControlNet.from_pretrained(tmp_path)
    assert difference(model(PROMPTS, **SIZE, **settings), wanted) > 5, "the two forms are two functions"


@pytest.mark.parametrize("form", ["nvlabs", "diffusers"])
def test_a_new_controlnet_and_one_of_scale_0_change_nothing(form: str) -> None:
    model = make_pipeline(form)
    settings = {"num_steps": 2, "seed": 1}
    plain = model(PROMPTS, **SIZE, **settings)
    steered = {"control_image": control_picture(), **settings}
    assert difference(model(PROMPTS, **SIZE, control_scale=0.0, **steered), plain) == 0
    assert difference(model(PROMPTS, **SIZE, **steered), plain) > 5
    model.controlnet = SanaControlNet.from_transformer(model.transformer, depth=2, form=form)  # type: ignore[arg-type]
    assert difference(model(PROMPTS, **SIZE, **steered), plain) == 0
    copied = model.controlnet.blocks[1].state_dict()
    assert_same_tensors(copied, model.transformer.blocks[1].state_dict())


def test_control_pictures_belong_to_their_prompts_whatever_the_batch() -> None:
    model, pictures = make_pipeline("nvlabs"), [control_picture(1), control_picture(2)]
    settings = {"num_steps": 2, "seed": 4}

    def last_latents(prompts: list[str], **options: Any) -> torch.Tensor:
        seen: dict[int, torch.Tensor] = {}
        model(prompts, on_step=lambda step, latents: seen.update({step: latents.clone()}), **(settings | options))
        return seen[1]

    together = last_latents(PROMPTS, control_image=pictures, num_images_per_prompt=2)
    for index, found in enumerate(together):
        own, other = (
            last_latents([PROMPTS[index // 2]], control_image=pictures[which], seed=4 + index % 2)[0]
            for which in (index // 2, 1 - index // 2)
        )
        assert (found - own).abs().max() < 1e-4 < 1 < (found - other).abs().max()
    drawn = model(PROMPTS, control_image=pictures, **settings)
    assert [image.size for image in drawn] == [(192, 128)] * 2, "by default the size is the control picture's"
    latents = encode_pictures(model.autoencoder, pictures)
    assert difference(model(PROMPTS, control_image=latents, **settings), drawn) == 0
    mask = Image.new("L", pictures[0].size)
    mask.paste(255, (0, 0, 96, 128))
    inpainted = model(PROMPTS, image=pictures[0], mask=mask, control_image=pictures[1], **settings)[0]
    assert difference([inpainted.crop((96, 0, 192, 128))], [pictures[0].crop((96, 0, 192, 128))]) == 0


def test_what_does_not_fit_is_refused(pth: Path, tmp_path: Path) -> None:
    model = make_pipeline("nvlabs")
    assert model.controlnet is not None
    plain = TextToImage(model.transformer, model.autoencoder, model.text_encoder)
    picture, other = control_picture(), scramble(SanaControlNet(control_config("nvlabs", replace(DEEP, dim=128))))
    wrong = TextToImage(model.transformer, model.autoencoder, model.text_encoder, controlnet=other)  # type: ignore[arg-type]
    config = control_config("diffusers")
    SanaControlNet(config).save_pretrained(tmp_path / "d")
    model.transformer.save_pretrained(tmp_path / "t")
    cases = [
        (lambda: plain(PROMPTS, control_image=picture), "no ControlNet: load it with controlnet="),
        (lambda: model(PROMPTS, control_image=[picture] * 3), "3 control pictures came with 2 prompts"),
        (
            lambda: model(PROMPTS, control_image=torch.zeros(2, 4, 4, 6)),
            r"latents have shape \(2, 4, 4, 6\): give \(1 or 2, 8, h, w\)",
        ),
        (lambda: model(PROMPTS, 64, 64, control_image=torch.zeros(1, 8, 4, 6)), "of pictures of 32x48 px, and 64x64"),
        (lambda: model(PROMPTS, control_image=picture, control_scale=float("nan")), "control_scale=nan"),
        (lambda: wrong(PROMPTS, control_image=picture), "the ControlNet has dim=128, the transformer 64"),
        (lambda: SanaControlNet.from_transformer(model.transformer), "depth=7 must be at least 1, and less than .* 4"),
        (lambda: model.controlnet.save_pretrained(tmp_path / "x", layout="diffusers"), "would compute another function"),
        (lambda: SanaControlNet(config).save_pretrained(tmp_path / "x.pth", layout="nvlabs"), "would compute another function"),
        (lambda: model.controlnet.save_pretrained(tmp_path / "x.pth", layout="nvlabs"), "together with its transformer"),
        (lambda: SanaControlNet.from_pretrained(tmp_path / "t"), "is not a ControlNet that is known here"),
        (lambda: SanaControlNet.from_pretrained(tmp_path / "d", form="nvlabs"), "form='nvlabs' would be another function"),
        (lambda: SanaControlNet.from_pretrained(pth, form="diffusers"), "trained with the form 'nvlabs'"),
        (lambda: control_config("both"), "form='both' must be one of nvlabs, diffusers"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
