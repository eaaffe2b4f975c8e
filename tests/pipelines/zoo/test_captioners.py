import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.zoo.captioner_training import batch_maker, encode_prompt, to_pixels, train_captioner
from pipelines.zoo.captioners import (
    PROMPTS,
    caption_images,
    chat,
    load_captioner,
    make_captioner,
    measure_captioner,
    save_captioner,
)
from pipelines.zoo.clip import clip_tokenizer, make_clip
from pipelines.zoo.config import LoopConfig, TinyCaptionerConfig
from pipelines.zoo.world import load_world

KINDS = ("llava", "llava-next")


def untrained(kind):
    torch.manual_seed(0)
    return make_captioner(kind, make_clip(clip_tokenizer()) if kind == "llava" else None)


@pytest.fixture(scope="module")
def world():
    return load_world(8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    """The folder of briefly trained captioners, whose captions depend on the image, and the losses of each kind."""
    folder, losses = tmp_path_factory.mktemp("captioners"), {}
    for kind in KINDS:
        model, processor = untrained(kind)
        losses[kind] = overfit(kind, model, processor, world, steps=60)
        save_captioner(model, processor, folder / kind)
    return folder, losses


@pytest.fixture(scope="module")
def checkpoints(trained):
    return trained[0]


def overfit(kind, model, processor, world, *, steps):
    """Train on one batch; return the losses."""
    batch = batch_maker(kind, processor)(world.scenes, world.images_as_tensor(slice(None)), np.random.default_rng(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_model_what_the_processor_gives(kind, world):
    _, processor = untrained(kind)
    images = [Image.fromarray(image) for image in world.images]
    ours = to_pixels(kind, world.images_as_tensor(slice(None)))
    theirs = processor(text=[chat(processor, PROMPTS[1])] * len(images), images=images, return_tensors="pt")
    assert set(theirs) == {"input_ids", "attention_mask", *ours}
    for name, value in ours.items():
        # A resized image is rounded to one of 256 levels by the processor.
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1.01 / 127.5 if kind == "llava-next" else 1e-6)
    np.testing.assert_array_equal(encode_prompt(processor, PROMPTS[1]), theirs["input_ids"][3])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_caption_and_its_end_are_learned(kind, world):
    _, processor = untrained(kind)
    tokenizer = processor.tokenizer
    batch = batch_maker(kind, processor)(world.scenes, world.images_as_tensor(slice(None)), np.random.default_rng(0))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels != -100
        assert (ids[learned] == labels[learned]).all() and labels[learned][-1] == tokenizer.eos_token_id
        first = int(learned.nonzero()[0])
        assert tokenizer.convert_ids_to_tokens(int(ids[first - 1])) == "<|assistant|>"
        assert tokenizer.unk_token_id not in labels
        assert (ids[first + int(learned.sum()) :] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_learned(kind, trained):
    folder, losses = trained
    assert losses[kind][14] < 0.7 * losses[kind][0]
    assert all(weight.isfinite().all() for weight in load_file(folder / kind / "model.safetensors").values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_captioner_loads_with_the_auto_classes_and_captions_any_image(kind, checkpoints):
    model = AutoModelForImageTextToText.from_pretrained(checkpoints / kind)
    processor = AutoProcessor.from_pretrained(checkpoints / kind)
    assert model.dtype == torch.bfloat16 and sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    images = [Image.new("RGB", size, "red") for size in [(1, 1), (300, 1), (33, 90), (640, 480), (64, 64)]]
    captions = caption_images(model, processor, images, "An unheard-of prompt!", batch_size=2)
    assert len(captions) == len(images) and all(isinstance(caption, str) for caption in captions)
    assert not any("<" in caption for caption in captions)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_do_not_depend_on_their_batch(kind, checkpoints, world):
    model, processor = load_captioner(checkpoints / kind)
    images = [Image.fromarray(image) for image in world.images]
    images[1] = images[1].resize((100, 40))  # another number of tokens in "llava-next": the rest is padded
    together = caption_images(model, processor, images)
    assert together == [caption_images(model, processor, [image])[0] for image in images]
    assert len(set(together)) > 1


def test_the_chat_template_reads_strings_urls_and_answers(checkpoints):
    processor = AutoProcessor.from_pretrained(checkpoints / "llava")
    messages = [
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "where?"},
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|><image>What?<|assistant|>a red circle</s><|user|>where?<|assistant|>"


def test_training_stops_at_its_target_and_measures_what_it_saved(tmp_path):
    loop = LoopConfig(num_steps=4, micro_batch_size=2, lr=1e-3, eval_every=2)
    path = str(tmp_path / "captioner")
    config = TinyCaptionerConfig(
        output_dir=path, kind="llava-next", cache_dir=str(tmp_path), loop=loop, stop_at=0.0, num_rows=20, num_measured=20
    )
    figures = train_captioner(config)
    model, processor = load_captioner(path)
    assert figures == measure_captioner(model, processor, load_world(20, first=10_000_000))
    with pytest.raises(ValueError, match="clip_dir=None, kind='llava'"):
        TinyCaptionerConfig(output_dir=path, kind="llava")


VLLM_SCRIPT = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    request = json.load(open(sys.argv[1]))
    model = LLM(request["model"], dtype="float32", enforce_eager=True, max_model_len=256, limit_mm_per_prompt={"image": 1})
    images = [Image.open(path).convert("RGB") for path in request["images"]]
    prompts = [{"prompt": request["prompt"], "multi_modal_data": {"image": image}} for image in images]
    outputs = model.generate(prompts, SamplingParams(temperature=0, max_tokens=request["max_tokens"]))
    answers = [{"ids": list(output.outputs[0].token_ids), "text": output.outputs[0].text} for output in outputs]
    json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_gives_the_same_tokens(kind, checkpoints, world, tmp_path):
    model, processor = load_captioner(checkpoints / kind)
    images = [Image.fromarray(image) for image in world.images]
    inputs = processor(text=[chat(processor, PROMPTS[0])] * len(images), images=images, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers = ask_vllm(checkpoints / kind, chat(processor, PROMPTS[0]), images, tmp_path)
    for ids, answer in zip(output.tolist(), answers, strict=True):
        assert answer["ids"] == [token for token in ids if token != processor.tokenizer.pad_token_id]
        # vLLM decodes word by word after the prompt, and so writes the space before the first.
        assert answer["text"].strip() == processor.tokenizer.decode(ids, skip_special_tokens=True)


def ask_vllm(model_dir: Path, prompt: str, images: list[Image.Image], folder: Path) -> list[dict]:
    paths = [str(folder / f"{index}.png") for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    request = {"model": str(model_dir), "prompt": prompt, "images": paths, "max_tokens": 48}
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "ask.py").write_text(VLLM_SCRIPT)
    command = [sys.executable, "ask.py", "request.json", "answers.json"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


def test_the_tower_has_its_published_names(checkpoints):
    for kind in KINDS:
        names = load_file(checkpoints / kind / "model.safetensors")
        assert all(name.startswith("vision_tower.vision_model.") for name in names if "vision_tower" in name)
