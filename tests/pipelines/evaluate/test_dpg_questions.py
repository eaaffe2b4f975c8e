"""DPG-Bench's questions and score: the CSV with its faults, the rule of dependencies, the means."""

import csv
import io
from typing import Any

import pytest

from pipelines.evaluate.dpg.questions import (
    Question,
    ScoreSums,
    apply_dependencies,
    picture_score,
    read_answer,
    read_questions,
)

HEADER = [
    *("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"),
    "question_natural_language",
]
GOOD: list[dict[str, Any]] = [
    {"item_id": "p1", "text": "A red  cat\nsits.", "proposition_id": 1, "dependency": "0", "tuple": "entity - whole (cat)",
     "question_natural_language": "Is there a cat?"},
    {"item_id": "p1", "text": "A red  cat\nsits.", "proposition_id": 2, "dependency": "1",
     "tuple": "attribute - color (cat, red)", "question_natural_language": "Is the cat red, or \"reddish\"?"},
    {"item_id": "p1", "text": "A red  cat\nsits.", "proposition_id": 3, "dependency": "1, 2",
     "tuple": "attribute - state (cat, sit)", "question_natural_language": "Does it sit?"},
    {"item_id": "p2", "text": "A dog.", "proposition_id": 1, "dependency": "0", "tuple": "entity - whole (dog)",
     "question_natural_language": "Is there a dog?"},
]  # fmt: skip


def text(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, HEADER)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def test_the_published_form_is_read() -> None:
    book = read_questions("\ufeff" + text(GOOD), "dpg.csv")
    assert book.faults == {} and list(book.questions) == ["a red cat sits", "a dog"]
    assert book.questions["a red cat sits"] == [
        Question(1, "Is there a cat?", (), "entity - whole"),
        Question(2, 'Is the cat red, or "reddish"?', (1,), "attribute - color"),
        Question(3, "Does it sit?", (1, 2), "attribute - state"),
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [  # the prompt has a line break in it
        ({"proposition_id": "two"}, "line 5: proposition_id 'two' is no number"),
        ({"proposition_id": "1"}, "line 5: proposition_id 1 comes twice"),
        ({"proposition_id": "0"}, "line 5: proposition_id is 0"),
        ({"dependency": "7"}, "line 5: dependency 7 is no other question"),
        ({"dependency": "2"}, "line 5: dependency 2 is no other question"),
        ({"dependency": ""}, "line 5: dependency '' is no number"),
        ({"question_natural_language": " "}, "line 5: question_natural_language is empty"),
    ],
)
def test_an_item_with_a_fault_is_left_out_and_told(change: dict[str, Any], told: str) -> None:
    book = read_questions(text([GOOD[0], {**GOOD[1], **change}, GOOD[3]]), "dpg.csv")
    assert list(book.questions) == ["a dog"]
    assert list(book.faults) == ["a red cat sits"] and told in book.faults["a red cat sits"]
    assert book.faults["a red cat sits"].startswith("dpg.csv, item 'p1', ")


def test_a_file_without_any_use_is_refused() -> None:
    with pytest.raises(ValueError, match="has no columns item_id, text"):
        read_questions("a,b\n1,2\n", "x.csv")
    with pytest.raises(ValueError, match="no questions can be used: it has no rows"):
        read_questions(text([]), "x.csv")
    with pytest.raises(ValueError, match=r"no questions can be used: .*line 3"):
        read_questions(text([{**GOOD[0], "dependency": "x"}]), "x.csv")


def chain(*parents: tuple[int, ...]) -> list[Question]:
    return [Question(number, "?", own, "entity") for number, own in enumerate(parents, 1)]


@pytest.mark.parametrize(
    ("questions", "said", "counts"),
    [  # the score of each is the published code's
        (chain((), (1,), (2,)), "yyy", "yyy"),
        (chain((), (1,), (2,)), "nyy", "nnn"),  # through the child to the grandchild
        (chain((), (1,), (2,)), "yny", "ynn"),
        (chain((), (), (1, 2)), "yny", "ynn"),  # one parent of two is enough
        (chain((), (), (1, 2)), "yyy", "yyy"),
        (chain((2,), (), ()), "yny", "nny"),  # a parent that comes later
        (chain((2,), (3,), ()), "yyn", "ynn"),  # it counts by its own answer, which is not zero yet
        (chain((), (), ()), "nyn", "nyn"),
    ],
)
def test_a_child_counts_only_with_its_parents(questions: list[Question], said: str, counts: str) -> None:
    answers = {number: letter == "y" for number, letter in enumerate(said, 1)}
    found = apply_dependencies(questions, answers)
    assert "".join("y" if found[number] else "n" for number in sorted(found)) == counts
    assert picture_score(found) == pytest.approx(counts.count("y") / 3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        ("Yes.", True),
        (" **No**, it is", False),
        ("no", False),
        ("yesterday", None),
        ("", None),
        ("I think", None),
    ],
)
def test_the_first_word_is_the_answer(answer: str, expected: bool | None) -> None:
    assert read_answer(answer) is expected


def test_the_score_is_the_mean_over_prompts_of_the_mean_over_pictures() -> None:
    sums = ScoreSums()
    for score in (1.0, 0.5, 0.75, 0.25):
        sums.add("a", score, [("entity - whole", True), ("attribute - color", score > 0.5)])
    sums.add("b", 0.0, [("global", False)])
    assert sums.figures() == pytest.approx(
        {
            "score": 100 * (0.625 + 0.0) / 2, "attribute": 50.0, "attribute - color": 50.0, "entity": 100.0,
            "entity - whole": 100.0, "global": 0.0,
        }
    )  # fmt: skip
    assert ScoreSums().figures() == {}
