"""DPG-Bench with VLMs of two engines: a served judge that reads drawn scenes, and a tiny VLM of transformers."""

import base64
import csv
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.caption.config import HttpConfig
from pipelines.evaluate.dpg.config import DpgConfig
from pipelines.evaluate.dpg.metric import DpgBench
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.run import MetricWorker
from pipelines.evaluate.shapes import AttributeJudge
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import full_caption
from pipelines.shapes.scenes import Scene, ShapesConfig
from pipelines.tables.schema import Row
from pipelines.workers.clip import ClipModel
from pipelines.workers.images import to_png
from tests.support.http_server import Handler, Server
from tests.support.metric_models import DPG_HEADER

NUM_PICTURES = 40
SHAPES_ONLY = ShapesConfig(pair_share=0.0)


def questions_of(scene: Scene) -> list[tuple[str, str, str]]:
    """Dependency, tuple and text of each question about a scene's caption."""
    thing = scene.things[0]
    return [
        ("0", f"entity - whole ({thing.shape})", f"Is there a {thing.shape}?"),
        ("1", f"attribute - color ({thing.shape})", f"Is it {thing.color}?"),
        ("0", "global ()", f"Is the background {scene.background}?"),
    ]


def answer_of(scene: Scene, question: str) -> bool:
    """The answer to a question about a picture of one object that shows `scene`."""
    asked = re.findall(r"\w+", question)[-1]
    thing = scene.things[0]
    return asked == (scene.background if "background" in question else thing.shape if "there" in question else thing.color)


class Answering(Handler):
    """An OpenAI-compatible server that looks at the picture by the tiny CLIP."""

    judge: AttributeJudge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        pixels = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        question = text["text"].removesuffix(" Answer with yes or no only.")
        scene = self.judge.read([Image.open(BytesIO(pixels)).convert("RGB")])[0]
        answer = {"message": {"content": "Yes." if answer_of(scene, question) else "No."}, "finish_reason": "stop"}
        self.reply(200, json.dumps({"choices": [answer], "usage": {"completion_tokens": 2}}).encode())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Answering.judge = AttributeJudge(ClipModel("zoo://clip"))
    with Server(Answering).running() as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, np.ndarray]]:
    return [draw_row(10_005_000 + number, SHAPES_ONLY) for number in range(NUM_PICTURES)]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Scene, np.ndarray]]) -> str:
    path = tmp_path_factory.mktemp("dpg") / "dpg_bench.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(DPG_HEADER)
        for item, scene in enumerate({full_caption(scene): scene for scene, _ in drawn}.values()):
            for number, (dependency, tuple_text, question) in enumerate(questions_of(scene), 1):
                writer.writerow([f"item{item}", full_caption(scene), number, dependency, tuple_text, question])
        writer.writerow(["long", "a long one", 1, 0, "global ()", "word " * 2000])
        writer.writerow(["bad", "a bad one", 1, 9, "global ()", "?"])
    return str(path)


def picture_rows(drawn: list[tuple[Scene, np.ndarray]], prompts: list[str]) -> pa.Table:
    pictures = [to_png(Image.fromarray(pixels)) for _, pixels in drawn]
    rows: list[Row] = [
        {"id": f"{number}", "prompt": prompt, "image_bytes": pictures[number % len(pictures)]}
        for number, prompt in enumerate(prompts)
    ]
    return pa.Table.from_pylist(rows)


def test_the_whole_chain_agrees_with_the_truth_of_drawn_scenes(
    server: str, drawn: list[tuple[Scene, np.ndarray]], questions: str, tmp_path: Path
) -> None:
    config = DpgConfig(model="judge", engine="http", http=HttpConfig(base_url=server), questions=questions)
    asked = [*(scene for scene, _ in drawn), *(scene for scene, _ in [*drawn[1:], drawn[0]])]  # the right prompts, and others'
    made = MetricWorker("dpg", config).process(picture_rows(drawn, [full_caption(scene) for scene in asked]))
    assert made.rejects == [] and len(made.rows) == 2 * NUM_PICTURES
    wrong = []
    for row, wanted, (shown, _) in zip(made.rows, asked, drawn * 2, strict=True):
        entity, color, background = (answer_of(shown, question) for _, _, question in questions_of(wanted))
        wrong.append(abs(row["dpg"] - (entity + (entity and color) + background) / 3))
        said = [answer["yes"] for answer in row["answers"]]
        assert [answer["counts"] for answer in row["answers"]] == [said[0], said[0] and said[1], said[2]]
    print(f"scores of pictures that equal the truth's: {np.mean(np.array(wrong) < 1e-6):.3f} of {len(wrong)}")
    assert np.mean(np.array(wrong) < 1e-6) >= 0.85
    table = metric_table(str(tmp_path), "x", "dpg")
    rows, _ = made.tables(table.schema)
    table.write_shard("00000", rows)
    figures = DpgBench.summarize(table, config)
    assert set(figures) == {
        *("dpg", "dpg.entity", "dpg.entity - whole", "dpg.attribute", "dpg.attribute - color", "dpg.global", "dpg_unclear")
    }
    assert figures["dpg_unclear"] == 0.0 and 50 < figures["dpg"] < 80


def test_a_vlm_of_transformers_is_asked_and_every_picture_is_accounted_for(
    drawn: list[tuple[Scene, np.ndarray]], questions: str
) -> None:
    config = DpgConfig(model="zoo://captioner-a", dtype="float32", questions=questions, batch_size=2, question_batch_size=4)
    prompts = [full_caption(drawn[0][0]), "a prompt of another benchmark", "a bad one", "a long one"]
    made = MetricWorker("dpg", config).process(picture_rows(drawn, prompts))
    assert [row["id"] for row in made.rows] == ["0"] and len(made.rows[0]["answers"]) == 3
    assert all(answer["unclear"] and answer["answer"] for answer in made.rows[0]["answers"])  # it only knows captions
    assert made.rows[0]["dpg"] == 0.0
    assert [row["reject_reason"] for row in made.rejects] == ["no_questions", "bad_questions", "prompt_too_long"]
    assert "item 'bad', line" in made.rejects[1]["detail"] and "question 1: " in made.rejects[2]["detail"]
    found, versions = DpgBench.find_models(config)
    assert found == config and set(versions) == {"judge", "questions"}


def test_missing_questions_are_told_before_a_model_is_loaded(questions: str) -> None:
    config = DpgConfig(model="no-such-model", questions="nowhere.csv")
    for attempt in (DpgBench, DpgBench.find_models):
        with pytest.raises(FileNotFoundError, match=r"DPG-Bench's questions are not at 'nowhere.csv': fetch https://.*csv"):
            attempt(config)
    with pytest.raises(ValueError, match=r"has no \{question\} in it"):
        DpgConfig(prompt="Is it so?", questions=questions)
