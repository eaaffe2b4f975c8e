"""VLMs are asked several questions about a picture, by each engine."""

import importlib.util
from dataclasses import replace

import pytest
from PIL import Image

from pipelines.caption.asking import make_asker
from pipelines.caption.config import CaptionerConfig, SamplingConfig, VllmConfig
from pipelines.caption.rows import Answer, Question
from pipelines.caption.transformers_engine import TransformersCaptioner
from pipelines.shapes.drawing import draw_row
from pipelines.tables.errors import StageError
from pipelines.tables.rejects import RowRefused

CONFIG = CaptionerConfig(
    name="judge",
    model="zoo://captioner-a",
    dtype="float32",
    sampling=SamplingConfig(max_new_tokens=16),
    context_length=256,
    batch_size=3,
)


def questions() -> list[Question]:
    images = [Image.fromarray(draw_row(10_000_500 + number)[1]) for number in range(2)]
    texts = ("Describe the image.", "Describe the image. " * 2, "word " * 300, "Describe it.")
    return [Question(f"{number}/{text[:3]}", image, text) for number, image in enumerate(images) for text in texts]


def test_every_question_gets_its_own_answer_in_order() -> None:
    asked = questions()
    found = make_asker(CONFIG).ask(asked)
    alone = [TransformersCaptioner(CONFIG).answer([question])[0] for question in asked[:3]]
    assert [str(one) for one in found[:3]] == [str(one) for one in alone]
    kinds = [isinstance(one, Answer) for one in found]
    assert kinds == [True, True, False, True] * 2
    assert all(one.reason == "prompt_too_long" for one in found if isinstance(one, RowRefused))
    assert make_asker(CONFIG).ask([]) == []


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_says_what_to_do() -> None:
    with pytest.raises(StageError, match=r'pip install "sana-on-ray\[vllm\]"'):
        make_asker(replace(CONFIG, engine="vllm"))


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_as_transformers_does() -> None:
    asked = questions()
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    config = replace(CONFIG, engine="vllm", vllm=VllmConfig(engine_args={"enforce_eager": True}, env=env))
    found, expected = make_asker(config).ask(asked), make_asker(CONFIG).ask(asked)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Answer) and isinstance(other, Answer):
            assert one.caption.strip() == other.caption.strip()
        elif isinstance(one, RowRefused):
            assert one.reason == "prompt_too_long"
