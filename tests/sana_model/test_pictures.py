"""Drawing from a picture: strength, masks, several images of a prompt, and what a PNG says about its drawing."""

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana_model.files.png import KEYWORD, read_facts, save_picture, to_png
from sana_model.flow import add_noise
from sana_model.guidance import guided_velocity
from sana_model.pictures import StartPictures, decode_pictures, encode_pictures
from sana_model.pipeline import TextToImage
from sana_model.solver import SOLVERS

PROMPTS = ["a large red circle on a white background", "a small blue square on a black background"]
SIDE = 64


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)


def picture(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mask_of(left: int, right: int, *, value: int = 255) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(value, (left, 0, right, SIDE))
    return mask


def difference(first: Image.Image, second: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int))


def test_strength_0_returns_the_picture_and_1_ignores_it(model: TextToImage) -> None:
    start = picture()
    for solver in SOLVERS:
        settings = {"num_steps": 3, "seed": 5, "solver": solver}
        drawn = model(PROMPTS, **settings)
        for one, other in zip(model(PROMPTS, image=start, strength=1, **settings), drawn, strict=True):
            assert difference(one, other).max() == 0 and np.asarray(one).std() > 10
        for one in model(PROMPTS, image=start, strength=0, **settings):
            assert difference(one, start).max() == 0


def test_the_strength_says_how_many_steps_are_done_and_how_much_changes(model: TextToImage) -> None:
    start, changes = model(PROMPTS[1:], seed=7)[0], []
    for strength in (0.0, 0.1, 0.45, 1.0):
        steps: list[int] = []
        settings = {"image": start, "strength": strength, "num_steps": 10, "seed": 8}
        drawn = model(PROMPTS[1:], on_step=lambda step, latents: steps.append(step), **settings)[0]  # noqa: B023
        assert len(steps) == int(np.ceil(strength * 10))
        changes.append(difference(drawn, start).mean())
    assert changes[0] == 0 < changes[1] < changes[2] < changes[3]


def test_a_middle_strength_is_the_last_steps_from_the_noised_picture(model: TextToImage) -> None:
    """Spelled out with Euler's method: 4 of 10 steps, one picture and one seed for each prompt."""
    starts, seeds = [picture(1), picture(2)], [3, 8]
    known = encode_pictures(model.autoencoder, starts)
    sigmas = SOLVERS["flow_euler"][1](10, model.flow_shift)[-5:]
    noise = torch.stack([torch.randn(known.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    null = model.text_encoder.encode([""], use_instruction=False)
    with torch.inference_mode():
        velocity = guided_velocity(model.transformer, model.text_encoder.encode(PROMPTS), null, guidance_scale=4.5)
        latents = add_noise(known, noise, sigmas[:1].expand(2))
        for now, after in pairwise(sigmas):
            latents = latents + (after - now) * velocity(latents, now)
        expected = decode_pictures(model.autoencoder, latents)
    drawn = model(PROMPTS, image=starts, strength=0.4, num_steps=10, seed=seeds, solver="flow_euler")
    for one, other in zip(drawn, expected, strict=True):
        assert difference(one, other).max() <= 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_inpainting_leaves_what_is_outside_the_mask(model: TextToImage, solver: str) -> None:
    start, mask = picture(3), mask_of(20, 50)
    for strength in (None, 0.7):
        drawn = model(PROMPTS, image=start, mask=mask, strength=strength, num_steps=4, seed=2, solver=solver)
        for one in drawn:
            changed = difference(one, start)
            assert changed[:, :20].max() == 0 and changed[:, 50:].max() == 0
            assert changed[:, 20:50].mean() > 5
        assert difference(drawn[0], drawn[1])[:, 20:50].mean() > 5


def test_the_mask_says_what_is_drawn(model: TextToImage) -> None:
    start, settings = picture(4), {"num_steps": 3, "seed": 2}
    free = model(PROMPTS[:1], **settings)[0]
    everything, nothing, half = (
        model(PROMPTS[:1], image=start, mask=mask, **settings)[0]
        for mask in (mask_of(0, SIDE), mask_of(0, 0), mask_of(0, SIDE, value=128))
    )
    assert difference(everything, free).max() == 0
    assert difference(nothing, start).max() == 0
    blend = (np.asarray(free) * 128.0 + np.asarray(start) * 127.0) / 255
    assert np.abs(np.asarray(half) - blend).max() <= 1


def test_each_prompt_may_have_its_own_mask(model: TextToImage) -> None:
    start = picture(4)
    one, other = model(PROMPTS, image=start, mask=[mask_of(0, 8), mask_of(56, 64)], num_steps=2, seed=2)
    assert difference(one, start)[:, 8:].max() == 0 < difference(one, start)[:, :8].max()
    assert difference(other, start)[:, :56].max() == 0 < difference(other, start)[:, 56:].max()


def test_a_seed_is_the_same_in_any_batch(model: TextToImage) -> None:
    settings = {"num_steps": 3, "image": picture(5), "strength": 0.8, "mask": mask_of(8, 56)}
    together = model(PROMPTS, num_images_per_prompt=3, seed=[10, 20], **settings)
    seeds = [10, 11, 12, 20, 21, 22]
    for index, seed in enumerate(seeds):
        alone = model([PROMPTS[index // 3]], seed=seed, **settings)[0]
        assert difference(together[index], alone).max() <= 1
    assert difference(together[0], together[1]).max() > 20
    assert [read_facts(image)["seed"] for image in together] == seeds
    with pytest.raises(ValueError, match="2 seeds came with 1 prompts"):
        model(PROMPTS[:1], num_images_per_prompt=2, seed=[1, 2])


def test_a_png_says_how_it_was_drawn_and_is_drawn_again(model: TextToImage, tmp_path: Path) -> None:
    prompt = 'a größes "red" circle \n und 円'
    drawn = model([prompt], 64, 128, num_images_per_prompt=2, num_steps=2, guidance_scale=3.5, negative_prompt="dark")
    save_picture(drawn[1], tmp_path / "x.png")
    facts = read_facts(tmp_path / "x.png")
    assert facts["prompt"] == prompt and facts["model"] == "zoo://pipeline"
    settings = {name: value for name, value in facts["settings"].items() if value is not None}
    again = TextToImage.from_pretrained(facts["model"], dtype=torch.float32)([facts["prompt"]], seed=facts["seed"], **settings)
    assert difference(again[0], Image.open(tmp_path / "x.png")).max() <= 1
    assert difference(drawn[0], drawn[1]).max() > 5, "without a seed each image has its own"
    assert read_facts(again[0])["settings"] == facts["settings"]


def test_a_picture_that_says_nothing_is_told() -> None:
    plain = to_png(picture())
    with pytest.raises(ValueError, match="does not say how it was drawn"):
        read_facts(plain)
    for text, message in (("{", "is damaged"), ("[1]", "holds a list, not an object")):
        image = picture()
        image.info[KEYWORD] = text
        with pytest.raises(ValueError, match=message):
            read_facts(to_png(image))


def test_pictures_are_upright_rgb_and_cover_the_size(model: TextToImage) -> None:
    rotated = picture(6, (96, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    buffer = BytesIO()
    rotated.save(buffer, "PNG", exif=exif)
    upright = rotated.transpose(Image.Transpose.ROTATE_270)
    drawn = model(PROMPTS[:1], image=Image.open(buffer), strength=0)[0]
    assert drawn.size == (32, 96) and difference(drawn, upright).max() == 0
    clear = picture(6).convert("RGBA")
    clear.putalpha(mask_of(0, 32))
    shown = np.asarray(model(PROMPTS[:1], image=clear, strength=0)[0])
    assert (shown[:, 32:] == 255).all() and (shown[:, :32] == np.asarray(clear)[:, :32, :3]).all()
    assert model(PROMPTS[:1], image=picture(7, (70, 100)), strength=0)[0].size == (72, 96)
    wide = model(PROMPTS[:1], 64, 64, image=picture(7, (128, 64)), strength=0)[0]
    assert difference(wide, picture(7, (128, 64)).crop((32, 0, 96, 64))).max() == 0


def test_a_latent_is_drawn_where_any_of_its_pixels_is() -> None:
    mask = Image.new("L", (24, 16))
    mask.putpixel((8, 7), 1)
    start = StartPictures.check(picture(0, (24, 16)), mask, None, 1)
    assert start is not None
    found = start.latent_mask(8)
    assert found is not None and found.tolist() == [[[[False, True, False], [False, False, False]]]]


def test_bad_input_is_named(model: TextToImage) -> None:
    cases = [
        ({"strength": 0.5}, "strength=0.5 came without a picture"),
        ({"mask": mask_of(0, 4)}, "a mask came without a picture"),
        ({"image": picture(), "strength": 1.5}, "strength=1.5 must be from 0"),
        ({"image": picture(), "strength": float("nan")}, "strength=nan must be a finite number"),
        ({"image": picture(), "strength": "0.5"}, "strength='0.5' must be a finite number"),
        ({"guidance_interval": None}, r"guidance_interval=None must be two numbers, \(lo, hi\)"),
        ({"guidance_interval": (0.2,)}, r"guidance_interval=\(0.2,\) must be two numbers"),
        ({"image": Image.fromarray(np.full((64, 64), 2.0, np.float32))}, "mode F with values from 2.0 to 2.0"),
        ({"image": picture(), "mask": Image.fromarray(np.full((64, 64), np.nan, np.float32))}, "mode F with values from nan"),
        ({"image": [picture()] * 3}, "3 pictures came with 2 prompts"),
        ({"image": [picture(), picture(0, (64, 72))]}, r"several sizes \(64x64, 64x72\): give height and width"),
        ({"image": []}, "0 pictures came with 2 prompts"),
        ({"image": picture(), "mask": [mask_of(0, 4)] * 3}, "3 masks came with 2 prompts"),
        ({"image": picture(0, (64, 72)), "mask": mask_of(0, 4)}, "a mask of 64x64 came with a picture of 64x72"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be at least 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(PROMPTS, num_steps=1, **arguments)
    for given in ("start.png", Path("start.png"), np.zeros((64, 64, 3)), torch.zeros(1, 3, 64, 64), [None], 3):
        for arguments in ({"image": given}, {"image": picture(), "mask": given}):
            with pytest.raises(TypeError, match=r"must be PIL images, and a .* came: PIL\.Image\.open"):
                model(PROMPTS, num_steps=1, **arguments)


def test_numbers_of_numpy_are_noted_as_numbers(model: TextToImage) -> None:
    numbers = {"strength": np.float32(0.5), "guidance_interval": np.array([0.0, 0.5], np.float32)}
    drawn = model(PROMPTS[:1], image=picture(), num_steps=1, seed=0, **numbers)
    settings = read_facts(drawn[0])["settings"]
    assert (settings["strength"], settings["guidance_interval"]) == (0.5, [0.0, 0.5])


def test_gray_of_16_bits_or_floats_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64).round()
    plain = Image.fromarray(ramp.astype(np.uint8))
    deep = Image.fromarray((ramp * 257).astype(np.uint16))
    for other in (deep, deep.convert("I"), Image.fromarray((ramp / 255).astype(np.float32))):
        found = StartPictures.check(other, other, None, 1)
        assert found is not None and found.masks is not None
        assert (np.asarray(found.images[0]) == np.asarray(plain.convert("RGB"))).all()
        assert (np.asarray(found.masks[0]) == np.asarray(plain)).all()
