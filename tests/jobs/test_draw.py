"""Pictures into a folder: what is drawn, what its files say, and what a wrong command line is told."""

import io
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jobs.common.config import parse_config
from jobs.draw import DrawJob, main, spell_out
from pipelines.draw import folder as folder_module
from pipelines.draw.again import settings_of
from pipelines.draw.estimate import estimate_drawing
from pipelines.draw.prompts import read_prompt_set
from sana_model.files.png import read_facts
from sana_model.pipeline import TextToImage

CIRCLE, SQUARE = "a large red circle on a white background", "a small blue square on a black background"
QUICK = ["--steps=2", "--seed=5"]


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.from_pretrained("zoo://pipeline")


def config_of(*words: str) -> Any:
    return parse_config(DrawJob, spell_out(list(words)), prog="draw", description="").to_sample()


def prompts_of(*words: str) -> list[str]:
    return read_prompt_set(config_of(*words).prompts).prompts


def test_a_seed_draws_the_picture_that_the_model_draws(tmp_path: Path, model: TextToImage, capsys: Any) -> None:
    command = [CIRCLE, SQUARE, *QUICK, "--count=2", "--batch=3", "--size=96x64", "--grid", "--out", str(tmp_path / "new")]
    assert main(command) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in files] == [
        "a-large-red-circle-on-a-white-background-5.png", "a-large-red-circle-on-a-white-background-6.png",
        "a-small-blue-square-on-a-black-backgroun-7.png",
        "a-small-blue-square-on-a-black-backgroun-8.png", "grid.png",
    ]  # fmt: skip
    expected = model([CIRCLE, CIRCLE, SQUARE, SQUARE], 64, 96, num_steps=2, seed=[5, 6, 7, 8])
    for file, image in zip(files, expected, strict=False):
        drawn = np.asarray(Image.open(file)).astype(int)
        assert np.abs(drawn - np.asarray(image)).max() <= 2  # batches of another size round otherwise
    assert Image.open(files[-1]).size == (2 * 96 + 2, 2 * 64 + 2)
    assert read_facts(files[3])["settings"]["width"] == 96
    again = settings_of(str(files[3]))
    assert (again["sample.prompts"], again["sample.draw.seed"], again["sample.lora"]) == ([SQUARE], 8, [])
    assert main(command) == 0  # the same files, byte for byte
    assert len(list((tmp_path / "new").iterdir())) == 5
    assert main([*command, "--guidance=1"]) == 0
    assert len(list((tmp_path / "new").iterdir())) == 10


def test_a_picture_a_mask_and_an_adapter(tmp_path: Path, model: TextToImage, capsys: Any) -> None:
    key = "transformer.transformer_blocks.{}.attn1.to_q.lora_{}.weight"
    generator = torch.Generator().manual_seed(0)
    shapes = {(n, kind): shape for n in range(6) for kind, shape in {"A": (2, 128), "B": (128, 2)}.items()}
    adapter = {key.format(*name): torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(adapter, tmp_path / "style.safetensors")
    start = model([CIRCLE], seed=0, num_steps=2)[0]
    start.save(tmp_path / "start.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    words = [SQUARE, *QUICK, "--from", str(tmp_path / "start.png"), "--mask", str(tmp_path / "mask.png"), "--strength=0.5"]
    style = f"{tmp_path}/style.safetensors"
    assert main([*words, "--lora", f"{style}:0.5", "--lora", style, "--out", str(tmp_path / "out")]) == 0
    file = capsys.readouterr().out.strip()
    arguments = {"num_steps": 2, "image": start, "mask": mask, "strength": 0.5, "seed": 5}
    without = np.asarray(model([SQUARE], **arguments)[0])
    for scale in (0.5, 1.0):
        model.load_lora(style, scale=scale)
    expected = np.asarray(model([SQUARE], **arguments)[0])
    model.unload_lora()
    assert np.array_equal(np.asarray(Image.open(file)), expected) and not np.array_equal(expected, without)
    assert np.array_equal(np.asarray(model([SQUARE], **arguments)[0]), without)
    assert settings_of(file)["sample.lora"] == [{"path": style, "scale": 0.5}, {"path": style, "scale": 1.0}]


def test_prompts_of_the_command_line_a_file_and_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    odd = 'a "cat": [red], #1'
    assert prompts_of(odd, "null") == [odd, "null"]
    assert prompts_of(odd) == [odd]
    assert prompts_of(str(tmp_path / "prompts.txt")) == ["a cat", "a dog"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a bird\na fish\n"))
    assert prompts_of("-", "--count", "2") == ["a bird", "a fish"]
    with pytest.raises(ValueError, match="give one of them"):
        spell_out(["a cat", "--prompts", "a dog"])


def test_a_dry_run_counts_the_weights_and_fetches_nothing(model: TextToImage, capsys: Any) -> None:
    assert main([CIRCLE, "--count=5", "--dry_run"]) == 0
    assert "20 steps, pictures at once: 4, times: 2" in capsys.readouterr().out
    assert main(["red", "star", "--dry_run"]) == 0
    assert "note: 2 prompts of one word each" in capsys.readouterr().err
    parts = estimate_drawing(config_of(CIRCLE)).parts
    modules = {"transformer": model.transformer, "text encoder": model.text_encoder.model, "autoencoder": model.autoencoder}
    for name, module in modules.items():
        assert parts[name] == sum(weight.nbytes for weight in module.parameters())
    published = estimate_drawing(config_of(CIRCLE, "--model=sana-0.6b-512", "--dtype=bfloat16"))
    assert 1.1e9 < published.parts["transformer"] < 1.3e9 and 5e9 < published.parts["text encoder"] < 5.5e9
    assert published.seconds["decoding"] > 0
    small = estimate_drawing(config_of(CIRCLE, "--model=sana-0.6b-512", "--dtype=bfloat16", "--memory=small"))
    assert max(small.moments.values()) < 0.5 * max(published.moments.values())
    assert small.moments["reading the prompts"] == small.parts["text encoder"] < 0.5 * published.parts["text encoder"]


WRONG = {
    "no-adapter": (["--lora"], "--lora: give a file, a folder or a URI behind it"),
    "no-model": (["--model", "nowhere/model"], "no file or folder 'nowhere/model'"),
    "short-name": (["--model", "sana-1.6b-1025"], "did you mean sana-1.6b-1024?"),
    "size-divides": (["--size", "100x64"], "width=100 must be a positive multiple of 8; the nearest is 96"),
    "size": (["--size", "big"], "size='big' must be width x height in pixels, such as 1024x768"),
    "mask-size": (
        ["--from", "{0}/start.png", "--mask", "{0}/small.png"],
        "error: --mask {0}/small.png is 8x8, and its picture",
    ),
    "no-picture": (["--from", "{0}/none.png"], "none.png"),
    "bad-picture": (["--from", "{0}/text.png"], "text.png cannot be read as a picture: not_an_image"),
    "no-from": (["--strength", "0.5"], "strength=0.5 came without a picture: give --from picture.png too"),
    "no-control": (["--control", "{0}/start.png"], "zoo://pipeline holds no ControlNet: give --controlnet too"),
    "no-lora": (["--lora", "{0}/none.safetensors:0.5"], "no file or folder '{0}/none.safetensors'"),
    "out": (["--out", "{0}/text.png/out"], "{0}/text.png/out cannot be written (Not a directory): give another folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_what_to_do(name: str, tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    words, told = WRONG[name]
    try:
        code = main([CIRCLE, "--out", str(tmp_path / "out"), *(word.format(tmp_path) for word in words)])
    except SystemExit as exit:
        code = int(str(exit.code))
    shown = capsys.readouterr()
    assert code in (1, 2) and told.format(tmp_path) in shown.err and "Traceback" not in shown.err
    assert not shown.out and not list(tmp_path.glob("out/*"))


def test_an_empty_prompt_is_refused_and_a_long_one_is_cut(tmp_path: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path), *QUICK]
    assert main([" ", *out]) == 1
    assert "holds no prompt: give at least one that is not blank" in capsys.readouterr().err
    assert main(["a large red circle, " * 250, *out]) == 0
    assert "note: 1 of 1 prompts are cut at the text encoder's max_tokens=" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_no_part_of_a_picture(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ValueError, match=r"a\.png cannot be written; .*: give another folder"):
            folder_module._write(tmp_path, "a", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
