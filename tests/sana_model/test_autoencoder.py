import pytest
import torch

from sana_model.autoencoder import DCAutoencoder
from sana_model.kernels.upsample_conv import upsample_conv, upsample_conv_reference
from tests.sana_model.peers import FAMILIES, assert_close, diffusers_autoencoder, scramble


def tiny_autoencoder() -> DCAutoencoder:
    return scramble(DCAutoencoder.from_preset("tiny"))


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("dc-ae-f32c32-in-1.0", 323_356_460),
        ("dc-ae-f32c32-sana-1.0", 312_250_275),
        ("dc-ae-f32c32-sana-1.1", 312_250_275),
        ("dc-ae-f64c128-in-1.0", 676_896_140),
        ("dc-ae-f128c512-in-1.0", 1_120_682_252),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, count):
    with torch.device("meta"):
        model = DCAutoencoder.from_preset(preset)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_encode_and_decode_equal_diffusers(name, tmp_path):
    config = FAMILIES[name]
    theirs = diffusers_autoencoder(config)
    theirs.save_pretrained(tmp_path)
    ours = DCAutoencoder.from_pretrained(tmp_path).eval()
    assert ours.config == config
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 2 * config.compression, 3 * config.compression, generator=generator) * 2 - 1
    with torch.no_grad():
        wanted = theirs.encode(image).latent * config.scaling_factor
        latents = ours.encode(image)
        assert_close(latents, wanted)
        assert_close(ours.decode(wanted), theirs.decode(wanted / config.scaling_factor).sample)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_upsampling_by_phases_equals_repeating_pixels(size, grad):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *size, generator=generator, requires_grad=grad)
    weight = torch.randn(4, 6, 3, 3, generator=generator, requires_grad=grad)
    bias = torch.randn(4, generator=generator, requires_grad=grad)
    ours, reference = upsample_conv(x, weight, bias), upsample_conv_reference(x, weight, bias)
    assert_close(ours, reference, 1e-5)
    if grad:
        upstream = torch.randn(ours.shape, generator=generator)
        for left, right in zip(
            torch.autograd.grad(ours, (x, weight, bias), upstream),
            torch.autograd.grad(reference, (x, weight, bias), upstream),
            strict=True,
        ):
            assert_close(left, right, 1e-5)


def test_tiles_blend_to_the_whole_where_the_model_is_local():
    """A convolutional map is the same in tiles as in one piece away from the tiles' borders, and blending keeps a constant."""
    model = tiny_autoencoder()
    image = torch.full((1, 3, 72, 120), 0.3)
    with torch.no_grad():
        model.encoder = torch.nn.AvgPool2d(8)  # local: every latent depends on its own pixels alone
        latents = model.encode(torch.arange(72 * 120.0).view(1, 1, 72, 120).expand(1, 8, -1, -1)[:, :3])
        model.encoder = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Conv2d(3, 8, 1))
        whole, tiled = model.encode(image), model.encode(image, tile_size=32, tile_overlap=16)
        assert_close(tiled, whole, 1e-5)
        model.decoder = torch.nn.Sequential(torch.nn.Conv2d(8, 3, 1), torch.nn.Upsample(scale_factor=8))
        for tile_size, overlap in ((32, 16), (32, 0), (24, 8), (512, 64)):
            assert_close(model.decode(whole, tile_size=tile_size, tile_overlap=overlap), model.decode(whole), 1e-5)
    assert latents.shape == (1, 3, 9, 15)


def test_tiled_decode_has_no_seam():
    """The step across a tile's border is no larger than the steps inside, after blending."""
    model = tiny_autoencoder()
    latents = torch.randn(1, 8, 4, 24, generator=torch.Generator().manual_seed(0))
    latents = torch.nn.functional.avg_pool1d(latents.flatten(1, 2), 9, 1, 4).unflatten(1, (8, 4))  # smooth
    with torch.no_grad():
        whole = model.decode(latents)
        blended = model.decode(latents, tile_size=96, tile_overlap=32)
        butted = model.decode(latents, tile_size=96, tile_overlap=0)
    step_at = lambda image, column: (image[..., column] - image[..., column - 1]).abs().mean()  # noqa: E731
    assert step_at(butted, 96) > 2 * step_at(whole, 96), "the test's model shows no seam: nothing is proven"
    columns = range(48, 144)
    assert max(step_at(blended, c) for c in columns) < 1.5 * max(step_at(whole, c) for c in columns)


def test_tiled_shapes_of_any_size():
    model = tiny_autoencoder()
    with torch.no_grad():
        for height, width in ((8, 8), (8, 264), (136, 72)):
            latents = model.encode(torch.randn(1, 3, height, width), tile_size=64)
            assert latents.shape == (1, 8, height // 8, width // 8)
            assert model.decode(latents, tile_size=64).shape == (1, 3, height, width)
            assert torch.isfinite(latents).all()


def test_training_mode_gives_gradients_to_every_parameter():
    model = scramble(DCAutoencoder.from_preset("tiny")).train()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    (model.decode(model.encode(image)) - image).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not without


def test_bad_input_is_named():
    model = tiny_autoencoder()
    cases = [
        (lambda: model.encode(torch.zeros(1, 3, 30, 32)), "30x32: height and width must be multiples of 8"),
        (lambda: model.encode(torch.zeros(1, 3, 0, 32)), "0x32"),
        (lambda: model.encode(torch.zeros(1, 1, 32, 32)), r"\(1, 1, 32, 32\).*\(B, 3, H, W\)"),
        (lambda: model.encode(torch.zeros(3, 32, 32)), r"\(3, 32, 32\)"),
        (lambda: model.decode(torch.zeros(1, 4, 8, 8)), r"\(1, 4, 8, 8\).*\(B, 8, h, w\)"),
        (lambda: model.decode(torch.zeros(1, 8, 8, 8), tile_size=20), "tile_size=20"),
        (lambda: model.decode(torch.zeros(1, 8, 8, 8), tile_size=32, tile_overlap=24), "tile_overlap=24"),
        (lambda: DCAutoencoder.from_preset("dc-ae-f8"), "unknown preset 'dc-ae-f8'"),
        (lambda: DCAutoencoder.from_preset("tiny", widths=(1, 2)), "same length"),
        (lambda: DCAutoencoder.from_preset("tiny", widths=(16, 32, 32, 96)), "1, 2 or 4 times"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
