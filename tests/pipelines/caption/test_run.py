"""The caption stage and its `transformers` engine, on the shipped captioners."""

import importlib.util
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.caption.config import CaptionerConfig, HttpConfig, QualityConfig, SamplingConfig, VllmConfig
from pipelines.caption.rows import fill_prompt, make_question
from pipelines.caption.run import caption_identity, run_caption
from pipelines.caption.transformers_engine import Gumbel, TransformersCaptioner
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import parse
from pipelines.shapes.scenes import ShapesConfig
from pipelines.stages.contract import Progress, Resources
from pipelines.tables.errors import StageError
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table
from pipelines.workers.images import decode
from tests.support.caption_world import FIRST, TOO_LONG, captions, image_row, png, scene, write_images

CONFIG = CaptionerConfig(
    name="a", model="zoo://captioner-a", dtype="float32", batch_size=4, sampling=SamplingConfig(max_new_tokens=48)
)


def images_table(contents: list[bytes]) -> pa.Table:
    rows = [
        {"id": f"id{number}", "image_bytes": content, "source_uri": f"photos/{number}.png"}
        for number, content in enumerate(contents)
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def scenes() -> pa.Table:
    return images_table([scene(number) for number in range(10)])


@pytest.mark.parametrize("model", ["zoo://captioner-a", "zoo://captioner-b"])
def test_captions_are_of_the_grammar_and_most_attributes_are_right(scenes: pa.Table, model: str) -> None:
    rows, rejects, _ = TransformersCaptioner(replace(CONFIG, model=model)).process(scenes)
    assert rejects == [] and [row["id"] for row in rows] == [f"id{number}" for number in range(10)]
    backgrounds = 0
    for number, row in enumerate(rows):
        assert row["finish_reason"] == "stop" and 8 < row["num_tokens"] < 48
        told = parse(row["caption"])
        backgrounds += told is not None and told.background == draw_row(FIRST + number, ShapesConfig())[0].background
    assert backgrounds >= 8


def test_a_bad_image_costs_its_row_and_no_other(scenes: pa.Table) -> None:
    captioner = TransformersCaptioner(CONFIG)
    contents = scenes["image_bytes"].to_pylist()
    rows, rejects, _ = captioner.process(images_table([*contents[:3], b"no image at all", *contents[3:]]))
    assert [row["id"] for row in rows] == [f"id{number}" for number in range(11) if number != 3]
    assert [(row["id"], row["source_uri"], row["reject_reason"]) for row in rejects] == [
        ("id3", "photos/3.png", "not_an_image")
    ]
    alone, _, _ = captioner.process(scenes)
    assert [row["caption"] for row in rows] == [row["caption"] for row in alone]


def test_the_batch_changes_no_caption(scenes: pa.Table) -> None:
    together, _, _ = TransformersCaptioner(replace(CONFIG, batch_size=10)).process(scenes)
    assert together == TransformersCaptioner(replace(CONFIG, batch_size=1)).process(scenes)[0]


def test_a_caption_that_is_cut_says_so(scenes: pa.Table) -> None:
    rows, _, _ = TransformersCaptioner(replace(CONFIG, sampling=SamplingConfig(max_new_tokens=3))).process(scenes.slice(0, 2))
    assert [(row["finish_reason"], row["num_tokens"]) for row in rows] == [("length", 3)] * 2


def test_images_of_any_size_are_taken(scenes: pa.Table) -> None:
    contents = [png(Image.new("RGB", size, "red")) for size in ((1, 1), (2000, 10), (640, 480))]
    config = replace(CONFIG, quality=QualityConfig(repetition="flag"))
    rows, rejects, _ = TransformersCaptioner(config).process(images_table(contents))
    assert len(rows) + len(rejects) == 3 and len(rows) >= 2


def test_sampling_draws_the_same_again(scenes: pa.Table) -> None:
    config = replace(CONFIG, sampling=SamplingConfig(temperature=1.5, max_new_tokens=48, seed=3))
    first, again = (TransformersCaptioner(config).process(scenes)[0] for _ in range(2))
    assert first == again
    assert first != TransformersCaptioner(CONFIG).process(scenes)[0]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="prompt='  ' is empty"):
        replace(CONFIG, prompt="  ")
    with pytest.raises(ValueError, match="name='a/b' must be a plain folder name"):
        replace(CONFIG, name="a/b")
    with pytest.raises(ValueError, match="name='original' is the name of the captions that came with the images"):
        replace(CONFIG, name="original")
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        SamplingConfig(temperature=-1)


def test_a_prompt_over_the_length_costs_its_row_and_no_other(scenes: pa.Table) -> None:
    asked = replace(CONFIG, prompt="Describe the image.{caption}")
    plain = TransformersCaptioner(CONFIG).process(scenes)
    texts: list[str | None] = [None] * 10
    texts[4] = TOO_LONG
    rows, rejects, _ = TransformersCaptioner(asked).process(scenes.append_column("caption", pa.array(texts, pa.string())))
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id4", "prompt_too_long")]
    assert "and the context has 256" in rejects[0]["detail"]
    assert rows == [row for row in plain.rows if row["id"] != "id4"]


def test_a_row_with_little_room_is_cut_alone(scenes: pa.Table) -> None:
    """The prompt of the first has 71 tokens, that of the second 20 more: so many fit of its caption, and the first is whole."""
    asked = replace(CONFIG, prompt="Describe the image.{caption}", context_length=94)
    texts = pa.array([None, "word " * 20], pa.string())
    made = TransformersCaptioner(asked).process(scenes.slice(0, 2).append_column("caption", texts))
    whole, cut = made.rows
    assert whole == TransformersCaptioner(CONFIG).process(scenes.slice(0, 1)).rows[0]
    assert (cut["num_tokens"], cut["finish_reason"], cut["flags"]) == (3, "length", ["cut_off"])


def fail_on(captioner: TransformersCaptioner, fails: Callable[[torch.Tensor], Exception | None]) -> list[int]:
    """Let the model fail as `fails` says of its pixels; returns the sizes of the batches that it was given."""
    sizes: list[int] = []
    generate = captioner.model.generate

    def wrapped(**inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs["pixel_values"]))
        if (error := fails(inputs["pixel_values"])) is not None:
            raise error
        return generate(**inputs)

    captioner.model.generate = wrapped
    return sizes


def test_out_of_memory_halves_the_batch_for_good_and_loses_no_row(scenes: pa.Table) -> None:
    captioner = TransformersCaptioner(replace(CONFIG, batch_size=8))
    expected = captioner.process(scenes)
    sizes = fail_on(captioner, lambda pixels: torch.OutOfMemoryError("no room") if len(pixels) > 2 else None)
    assert captioner.process(scenes) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2] and captioner.batch_size == 2


@pytest.mark.parametrize(
    ("error", "reason"), [(torch.OutOfMemoryError("no room"), "out_of_memory"), (ValueError("odd"), "caption_failed")]
)
def test_a_row_that_fails_alone_is_the_only_one_lost(scenes: pa.Table, error: Exception, reason: str) -> None:
    captioner = TransformersCaptioner(CONFIG)
    expected = captioner.process(scenes)
    poisoned = captioner.processor(text="<image>", images=[decode(scenes["image_bytes"][5].as_py())], return_tensors="pt")
    pixels = poisoned["pixel_values"][0]
    fail_on(captioner, lambda batch: error if any(torch.equal(image, pixels) for image in batch) else None)
    rows, rejects, _ = captioner.process(scenes)
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("id5", reason)]
    assert rows == [row for row in expected.rows if row["id"] != "id5"]


def test_special_tokens_in_the_images_own_text_are_text(scenes: pa.Table) -> None:
    """The processor finds one image in each prompt, and no end of a text in what a stranger wrote."""
    texts = ["<image>", "</s><|assistant|>", "<pad> " * 3, "<im<x>age>", "<<image>>", "＜image＞", "<s>"]
    captioner = TransformersCaptioner(replace(CONFIG, prompt="Describe the image.{caption}"))
    plain = scenes.slice(0, len(texts))
    made = captioner.process(plain.append_column("caption", pa.array(texts, pa.string())))
    assert len(made.rows) == len(texts), made.rejects
    tokenizer = captioner.processor.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    usual = sum(id in special for id in tokenizer(captioner._chat("Describe the image."))["input_ids"])
    for text in texts:
        ids = tokenizer(captioner._chat(fill_prompt(captioner.config.prompt, {"caption": text})))["input_ids"]
        assert sum(id in special for id in ids) == usual, text


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("a <3 heart, [OC] <-> [stock photo]", "a <3 heart, [OC] < -> [stock photo]"),
        ("<|im_end|><|im_start|>system", "< |im_end|>< |im_start|>system"),
        ("[INST] x [/INST] [IMG][IMG_END] [control_8]", "[ INST] x [ /INST] [ IMG][ IMG_END] [ control_8]"),
        ("<start_of_turn> <｜end▁of▁sentence｜> <loc0001>", "< start_of_turn> < ｜end▁of▁sentence｜> < loc0001>"),
        (None, ""),
    ],
)
def test_nothing_of_a_caption_is_lost_on_its_way_into_a_prompt(caption: str | None, told: str) -> None:
    assert fill_prompt("{caption}", {"caption": caption}) == told


def test_a_prompt_that_the_processor_refuses_costs_its_row(scenes: pa.Table) -> None:
    """A placeholder too many: the processor refuses the whole batch for it."""
    captioner = TransformersCaptioner(CONFIG)
    questions = [make_question(row, CONFIG) for row in scenes.slice(0, 3).to_pylist()]
    questions[1] = replace(questions[1], prompt="<image> What?")
    first, second, third = captioner.answer(questions)
    assert isinstance(second, RowRefused) and second.reason == "caption_failed"
    assert [first, third] == captioner.answer([questions[0], questions[2]])


def test_a_model_that_fails_with_every_image_ends_the_stage(scenes: pa.Table) -> None:
    captioner = TransformersCaptioner(CONFIG)
    fail_on(captioner, lambda batch: RuntimeError("no such kernel"))
    with pytest.raises(StageError, match="failed with each of 10 images alone, at last by RuntimeError: no such kernel"):
        captioner.process(scenes)


def test_what_is_drawn_for_an_image_depends_on_no_other(scenes: pa.Table) -> None:
    config = replace(CONFIG, sampling=SamplingConfig(temperature=1.5, max_new_tokens=48, seed=3), batch_size=10)
    together = TransformersCaptioner(config).process(scenes)
    alone = TransformersCaptioner(replace(config, batch_size=1)).process(scenes.slice(3, 4))
    ids = {row["id"] for row in alone.rows}
    assert len(ids) > 1 and [row for row in together.rows if row["id"] in ids] == alone.rows


def test_draws_follow_the_probabilities() -> None:
    """Of 4,000 rows with their own generators, against softmax; the limit is four standard deviations."""
    scores = torch.tensor([[2.0, 1.0, 0.0, float("-inf")]]).repeat(4000, 1)
    drawn = Gumbel(list(range(4000)), torch.device("cpu"))(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.tensor([2.0, 1.0, 0.0, float("-inf")]).softmax(0)
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_an_actor_killed_in_the_middle_loses_nothing(tmp_path: Path, local_ray: None) -> None:
    dataset = write_images(tmp_path / "data", [image_row(number, scene(number)) for number in range(20)], 4)
    config = replace(CONFIG, name="killed", resources=Resources(num_cpus=1))
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.done_shards == 2 and not killed:
            actors = [process for process in psutil.Process().children(recursive=True) if "_Worker" in process.name()]
            killed.extend(actor.pid for actor in actors)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    result = run_caption(dataset, config, on_progress=kill)
    assert killed and result.found_shards == 0 and result.num_rows == 20
    images, undisturbed = Table(dataset, IMAGES_PATH, IMAGES), TransformersCaptioner(config)
    expected = {shard: undisturbed.process(images.read_shard(shard)).rows for shard in images.list_shards()}
    assert captions(dataset, "killed") == expected


def test_what_changes_captions_is_in_the_identity_and_the_rest_is_not(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "data", [image_row(0, scene(0))], 1)
    config = replace(CONFIG, engine="vllm")
    same = {
        "batch_size": 1,
        "device": "cpu",
        "resources": Resources(num_actors=7),
        "max_reject_share": 0.5,
        "vllm": VllmConfig(batch_size=1, gpu_memory_utilization=0.5, env={"A": "b"}),
        "http": HttpConfig(base_url="http://elsewhere:1/v1"),
    }
    other = {
        "prompt": "Why?",
        "engine": "http",
        "context_length": 100,
        "max_image_size": 3,
        "dtype": "bfloat16",
        "sampling": SamplingConfig(top_p=0.5),
        "quality": QualityConfig(cut_off="reject"),
        "vllm": VllmConfig(engine_args={"quantization": "fp8"}),
    }
    fingerprint = caption_identity(dataset, config, {}).fingerprint
    for name, value in same.items():
        assert caption_identity(dataset, replace(config, **{name: value}), {}).fingerprint == fingerprint, name
    for name, value in other.items():
        assert caption_identity(dataset, replace(config, **{name: value}), {}).fingerprint != fingerprint, name


def test_engines_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"resources\.num_gpus=1 must be a multiple of vllm\.tensor_parallel_size=2"):
        replace(CONFIG, engine="vllm", vllm=VllmConfig(tensor_parallel_size=2), resources=Resources(num_gpus=1))
    with pytest.raises(ValueError, match=r"http\.base_url='server:8000' must be a URL"):
        HttpConfig(base_url="server:8000")
    with pytest.raises(ValueError, match="max_attempts=0 must be at least 1"):
        HttpConfig(max_attempts=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        VllmConfig(batch_size=0)
    with pytest.raises(ValueError, match="a folder that every node sees; copy s3://bucket/model"):
        replace(CONFIG, engine="vllm", model="s3://bucket/model")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_engine_says_what_is_missing(tmp_path: Path, local_ray: None) -> None:
    dataset = write_images(tmp_path / "data", [image_row(0, scene(0))], 1)
    with pytest.raises(StageError, match="engine=vllm needs vLLM on the nodes of the cluster: pip install"):
        run_caption(dataset, replace(CONFIG, engine="vllm"))
