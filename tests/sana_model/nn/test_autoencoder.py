import pytest
import torch

from sana_model.nn.autoencoder import DCAutoencoder
from tests.support.peers import FAMILIES, assert_close, diffusers_autoencoder, scramble


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
    ours = DCAutoencoder.from_pretrained(tmp_path)
    assert ours.config == config and not ours.training
    convolution = ours.decoder.stages[0][-1].conv1 if config.decoder_depths[0] else ours.decoder.stages[1][-1].conv1
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 2 * config.compression, 3 * config.compression, generator=generator) * 2 - 1
    with torch.no_grad():
        wanted = theirs.encode(image).latent * config.scaling_factor
        latents = ours.encode(image)
        assert_close(latents, wanted)
        assert_close(ours.decode(wanted), theirs.decode(wanted / config.scaling_factor).sample)


@pytest.mark.parametrize(("tile_size", "overlap"), [(32, 16), (32, 0), (24, 8), (512, 64)])
def test_tiles_blend_to_the_whole_where_the_model_is_local(tile_size, overlap):
    """With an encoder and a decoder in which each latent is about its own pixels alone, tiles and the whole are the same."""
    model = tiny_autoencoder()
    model.encoder = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Conv2d(3, 8, 1))
    model.decoder = torch.nn.Sequential(torch.nn.Conv2d(8, 3, 1), torch.nn.Upsample(scale_factor=8))
    image = torch.randn(2, 3, 72, 120, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents, decoded = model.encode(image), model.decode(model.encode(image))
        assert_close(model.encode(image, tile_size=tile_size, tile_overlap=overlap), latents, 1e-5)
        assert_close(model.decode(latents, tile_size=tile_size, tile_overlap=overlap), decoded, 1e-5)


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


def test_the_callers_tensors_are_left_alone():
    model = tiny_autoencoder()
    image = torch.rand(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    latents = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    kept = image.clone(), latents.clone()
    with torch.no_grad():
        model.encode(image), model.decode(latents)
        model.encode(image, tile_size=16), model.decode(latents, tile_size=16)
    assert torch.equal(image, kept[0]) and torch.equal(latents, kept[1])


def test_weights_written_behind_autograds_back_are_seen():
    """EMA swaps, merged LoRAs and DeepSpeed write through `.data`."""
    model, latents = tiny_autoencoder(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        model.decode(latents)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        changed = model.decode(latents)
        fresh = DCAutoencoder(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        assert_close(changed, fresh.decode(latents), 1e-6)


def test_results_with_and_without_gradients_are_the_same():
    model, image = tiny_autoencoder(), torch.rand(1, 3, 32, 48)
    with_gradients = model.decode(model.encode(image))
    with torch.no_grad():
        assert_close(model.decode(model.encode(image)), with_gradients.detach(), 1e-6)
