"""DPG-Bench: a VLM answers questions about each picture."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.dpg.config import QUESTION, QUESTIONS_URL, DpgConfig
from pipelines.evaluate.dpg.questions import (
    Question,
    QuestionBook,
    ScoreSums,
    apply_dependencies,
    groups_of,
    picture_score,
    prompt_key,
    read_answer,
    read_questions,
)
from pipelines.evaluate.metric import iter_shards
from pipelines.evaluate.vlm import VlmMetric
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from pipelines.caption.rows import Outcome


class DpgBench(VlmMetric[DpgConfig]):
    """Hu et al. 2024 (ELLA, arXiv 2403.05135); published results are over 1,065 prompts with 4 pictures each.

    Figures, from 0 to 100: `dpg`, the mean over the prompts; `dpg.<category>` the share of its questions answered with yes, for
    "attribute", "attribute - color" and so on. `dpg_unclear` is the share (0 to 1) of answers that are neither yes nor no; they
    count as no.
    """

    name: ClassVar = "dpg"

    def __init__(self, config: DpgConfig):
        self.book = read_book(config.questions)
        super().__init__(config)

    @classmethod
    def find_models(cls, config: DpgConfig) -> tuple[DpgConfig, dict[str, str]]:
        read_book(config.questions)  # before a model is fetched
        place = _questions_file(config.questions)
        version = f"sha256:{hashlib.sha256(place.read_bytes()).hexdigest()[:32]}"
        found, versions = super().find_models(config)
        return found, {**versions, "questions": version}

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        from pipelines.caption import rows as captioning

        questions = [self._questions(row["prompt"]) for row in rows]
        asked = [
            captioning.Question(f"{row['id']}/{question.number}", row["picture"], self._wording(question))
            for row, own in zip(rows, questions, strict=True)
            if not isinstance(own, RowRefused)
            for question in own
        ]
        outcomes = iter(self.asker.ask(asked))
        return [own if isinstance(own, RowRefused) else _judge_picture(own, [next(outcomes) for _ in own]) for own in questions]

    def _questions(self, prompt: str) -> list[Question] | RowRefused:
        key = prompt_key(prompt)
        if key in self.book.questions:
            return self.book.questions[key]
        if key in self.book.faults:
            return RowRefused("bad_questions", self.book.faults[key])
        return RowRefused("no_questions", f"{self.config.questions} has no questions about {prompt[:200]!r}")

    def _wording(self, question: Question) -> str:
        return self.config.prompt.replace(QUESTION, question.text)

    @classmethod
    def summarize(cls, table: Table, config: DpgConfig) -> dict[str, float]:
        sums, unclear, count = ScoreSums(), 0, 0
        for shard in iter_shards(table, ["prompt", "dpg", "answers"]):
            for row in shard.to_pylist():
                sums.add(row["prompt"], row["dpg"], [(answer["category"], answer["yes"]) for answer in row["answers"]])
                unclear += sum(answer["unclear"] for answer in row["answers"])
                count += len(row["answers"])
        figures = {cls.name if name == "score" else f"{cls.name}.{name}": value for name, value in sums.figures().items()}
        return figures | ({"dpg_unclear": unclear / count} if count else {})

    @classmethod
    def describe(cls, row: Row) -> list[str]:
        told = [
            f"question {answer['question']} ({answer['category']}): {answer['answer']!r}"
            + ("" if not answer["yes"] else ", but what it depends on is not there")
            for answer in row["answers"]
            if not answer["counts"]
        ]
        return [f"{100 * row['dpg']:.4g} % of {len(row['answers'])} questions", *told]

    @classmethod
    def scores(cls, table: Table) -> Iterator[tuple[str, str, float]]:
        for shard in iter_shards(table, ["prompt", "dpg", "answers"]):
            for row in shard.to_pylist():
                yield cls.name, row["prompt"], 100 * row["dpg"]
                for answer in row["answers"]:
                    for category in groups_of(answer["category"]):
                        yield f"{cls.name}.{category}", row["prompt"], 100.0 * answer["yes"]
                    yield "dpg_unclear", row["prompt"], float(answer["unclear"])


def _judge_picture(questions: list[Question], outcomes: "list[Outcome]") -> Row | RowRefused:
    """The row of a picture; the refusal of the first question that was refused, if any was."""
    texts = []
    for question, outcome in zip(questions, outcomes, strict=True):
        if isinstance(outcome, RowRefused):
            return RowRefused(outcome.reason, f"question {question.number}: {outcome.detail}")
        texts.append(outcome.caption)
    read = [read_answer(text) for text in texts]
    said = {question.number: bool(answer) for question, answer in zip(questions, read, strict=True)}
    counts = apply_dependencies(questions, said)
    answers = [
        {
            "question": question.number,
            "category": question.category,
            "answer": text[:200],
            "yes": said[question.number],
            "counts": counts[question.number],
            "unclear": answer is None,
        }
        for question, text, answer in zip(questions, texts, read, strict=True)
    ]
    return {"dpg": picture_score(counts), "answers": answers}


def read_book(address: str) -> QuestionBook:
    """Read the questions. Raises FileNotFoundError or ValueError, which say what to do."""
    return read_questions(_questions_file(address).read_bytes().decode("utf-8", errors="replace"), address)


def _questions_file(address: str) -> Path:
    from sana_model.files.places import resolve

    try:
        return resolve(address)
    except FileNotFoundError as error:
        advice = f"fetch {QUESTIONS_URL} and set evaluate.dpg.questions to its path or URI"
        raise FileNotFoundError(f"DPG-Bench's questions are not at {address!r}: {advice}") from error
