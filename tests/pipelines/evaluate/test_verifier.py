"""The verifier: a served VLM that reads drawn scenes, a tiny VLM of transformers, and the published rule."""

import base64
import json
import math
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.caption.asking import TransformersAsker, make_asker
from pipelines.caption.config import HttpConfig
from pipelines.caption.rows import Question, ScoredAnswer
from pipelines.evaluate.best_of.choose import choose
from pipelines.evaluate.run import MetricWorker
from pipelines.evaluate.verifier import Verifier, word_log_prob
from pipelines.evaluate.verifier_config import PUBLISHED_PROMPT, VerifierConfig
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import full_caption
from pipelines.shapes.scenes import ShapesConfig
from pipelines.tables.errors import StageError
from pipelines.workers.clip import ClipModel
from pipelines.workers.images import to_png
from tests.support.http_server import Handler, Server

BEFORE, AFTER = PUBLISHED_PROMPT.split("{prompt}")
DRAWN = [draw_row(10_007_000 + number, ShapesConfig(pair_share=0.0)) for number in range(8)]


class Verifying(Handler):
    """An OpenAI-compatible server whose yes is as sure as the tiny CLIP's score is high. A model "mute" tells no tokens."""

    clip: ClipModel

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        pixels = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        prompt = text["text"].removeprefix(BEFORE).removesuffix(AFTER)
        images = self.clip.embed_images([Image.open(BytesIO(pixels)).convert("RGB")])
        yes = 1 / (1 + math.exp(3 - 6 * float(images[0] @ self.clip.embed_texts([prompt])[0])))
        top = [{"token": "Yes", "logprob": math.log(yes)}, {"token": " no", "logprob": math.log(1 - yes)}]
        assert body["logprobs"] and body["top_logprobs"] == 20
        choice = {"message": {"content": "Yes." if yes > 0.5 else "no"}, "finish_reason": "stop"}
        if body["model"] != "mute":
            choice["logprobs"] = {"content": [{"token": top[0]["token"], "top_logprobs": top}]}
        self.reply(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 2}}).encode())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Verifying.clip = ClipModel("zoo://clip")
    with Server(Verifying).running() as running:
        yield f"{running.url}/v1"


def pictures(prompt: str) -> pa.Table:
    contents = [to_png(Image.fromarray(pixels)) for _, pixels in DRAWN]
    return pa.Table.from_pylist(
        [{"id": f"{number}", "prompt": prompt, "image_bytes": content} for number, content in enumerate(contents)]
    )


def test_a_tournament_by_a_served_verifier_keeps_the_picture_that_shows_the_prompt(server: str) -> None:
    config = VerifierConfig(model="judge", engine="http", http=HttpConfig(base_url=server))
    for number in (0, 5):
        made = MetricWorker("verifier", config).process(pictures(full_caption(DRAWN[number][0])))
        assert len(made.rows) == 8 and made.rows[number]["yes"] and not all(row["yes"] for row in made.rows)
        ranks = [Verifier.rank(row) for row in made.rows]
        assert choose(ranks, 1, "tournament") == choose(ranks, 1, "best") == [number]
    with pytest.raises(StageError, match="mute tells no log-probabilities of tokens"):
        MetricWorker("verifier", VerifierConfig(model="mute", engine="http", http=HttpConfig(base_url=server))).process(
            pictures("a star")
        )


def test_a_vlm_of_transformers_tells_the_log_probabilities_of_a_forward_pass() -> None:
    config = VerifierConfig(model="zoo://captioner-a", dtype="float32", batch_size=2)
    asker = make_asker(config.judge)
    assert isinstance(asker, TransformersAsker)
    images = [Image.fromarray(pixels) for _, pixels in DRAWN[:3]]
    answers = asker.ask([Question(f"{number}", image, "Say.", 5) for number, image in enumerate(images)])
    plain = asker.ask([Question(f"{number}", image, "Say.") for number, image in enumerate(images)])
    captioner = asker.captioner
    for image, answer, same in zip(images, answers, plain, strict=True):
        assert isinstance(answer, ScoredAnswer) and not isinstance(same, ScoredAnswer) and answer.caption == same.caption
        inputs = captioner.processor(text=[captioner._chat("Say.")], images=[[image]], return_tensors="pt")
        with torch.inference_mode():
            top = captioner.model(**inputs).logits[0, -1].log_softmax(-1).topk(5).values
        assert np.allclose(sorted(answer.first_tokens.values(), reverse=True), top.tolist(), atol=1e-3)
    made = MetricWorker("verifier", config).process(pictures("a <image> of a star"))
    assert len(made.rows) == 8 and not any(row["yes"] for row in made.rows)  # it only knows captions
    found, versions = Verifier.find_models(config)
    assert found == config and set(versions) == {"judge"}


def test_the_published_rule_and_the_log_probability_of_a_word() -> None:
    said = [(True, -0.1), (True, -0.4), (False, -2.0), (False, -0.1)]  # best first
    ranks = [Verifier.rank({"yes": yes, "log_prob": value}) for yes, value in said]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) == 4
    tokens = {"Yes": math.log(0.5), "\u0120yes": math.log(0.2), "No": math.log(0.1), "Yesterday": math.log(0.05)}
    assert word_log_prob(tokens, "yes") == pytest.approx(math.log(0.7))
    assert word_log_prob({"The": -0.1, "A": -3.0}, "no") == -3.0
    for settings, told in [({"question": "Good?"}, r"has no \{prompt\}"), ({"num_first_tokens": 1}, "must be at least 2")]:
        with pytest.raises(ValueError, match=told):
            VerifierConfig(**settings)  # type: ignore[arg-type]
