"""The questions of DPG-Bench: the published CSV, read with its faults told, and the rule by which answers become a score.

Source: Hu et al., "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment" (arXiv 2403.05135), and the code
published with it. Pure functions.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
"""The columns that are read; the file has more."""
NO_PARENT = 0


@dataclass(frozen=True)
class Question:
    """A question about a picture, to be answered with yes or no.

    number: within its prompt. parents: numbers of the questions that it depends on. category: such as "attribute - color".
    """

    number: int
    text: str
    parents: tuple[int, ...]
    category: str


@dataclass
class QuestionBook:
    """The questions of each prompt, by its text as `prompt_key` gives it.

    faults: why the questions of an item of the file cannot be used, by the same key; no such item is in `questions`.
    """

    questions: dict[str, list[Question]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def prompt_key(prompt: str) -> str:
    """The words of a prompt in lower case, without punctuation: in that, the files of prompts and the CSV may differ."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def read_questions(text: str, source: str) -> QuestionBook:
    """Read `dpg_bench.csv`.

    An item with any fault (a number that is none, a question twice or without text, a parent that is not asked) is left out
    whole, and the first fault is told with its line. The published code takes the file's first row for a second header, so that
    its first prompt fails there; here it counts.

    Args:
        text: the file's content.
        source: its name, for errors.

    Raises ValueError if columns are missing, or no item can be used.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{source} has no columns {', '.join(missing)}: it is not the questions of DPG-Bench (dpg_bench.csv)")
    items: dict[str, list[tuple[int, dict[str, str | None]]]] = {}
    for row in reader:
        items.setdefault(row["item_id"] or "", []).append((reader.line_num, row))
    book = QuestionBook()
    for item, rows in items.items():
        key = prompt_key(rows[0][1]["text"] or "")
        try:
            questions = _read_item(rows)
            if key in book.questions:
                raise ValueError(f"line {rows[0][0]}: another item has the same prompt")
        except ValueError as error:
            book.faults.setdefault(key, f"{source}, item {item!r}, {error}")
            continue
        book.questions[key] = questions
    if not book.questions:
        first = next(iter(book.faults.values()), "it has no rows")
        raise ValueError(f"{source}: no questions can be used: {first}")
    return book


def _read_item(rows: Sequence[tuple[int, Mapping[str, str | None]]]) -> list[Question]:
    """The questions of one prompt, in the file's order. Raises ValueError that begins with the line."""
    questions: dict[int, Question] = {}
    lines: dict[int, int] = {}
    for line, row in rows:
        number = _number(row["proposition_id"], "proposition_id", line)
        if number in questions:
            raise ValueError(f"line {line}: proposition_id {number} comes twice")
        if number == NO_PARENT:
            raise ValueError(f"line {line}: proposition_id is 0, which in `dependency` means that there is none")
        asked = (row["question_natural_language"] or "").strip()
        if not asked:
            raise ValueError(f"line {line}: question_natural_language is empty")
        parents = [_number(part, "dependency", line) for part in (row["dependency"] or "").split(",")]
        category = (row["tuple"] or "").split("(")[0].strip()
        questions[number] = Question(number, asked, tuple(parent for parent in parents if parent != NO_PARENT), category)
        lines[number] = line
    for question in questions.values():
        for parent in question.parents:
            if parent not in questions or parent == question.number:
                raise ValueError(f"line {lines[question.number]}: dependency {parent} is no other question of this prompt")
    return list(questions.values())


def _number(text: str | None, column: str, line: int) -> int:
    try:
        return int(float(text or ""))
    except ValueError:
        raise ValueError(f"line {line}: {column} {text!r} is no number") from None


def apply_dependencies(questions: Sequence[Question], is_yes: Mapping[int, bool]) -> dict[int, bool]:
    """Whether each question counts as answered with yes: it was, and each of its parents counts.

    As published, the questions are gone through in the file's order: a parent that comes after its child counts by its own
    answer alone.
    """
    counts = dict(is_yes)
    for question in questions:
        if not all(counts[parent] for parent in question.parents):
            counts[question.number] = False
    return counts


def picture_score(counts: Mapping[int, bool]) -> float:
    """The share of the questions about a picture that count as yes."""
    return sum(counts.values()) / len(counts)


def read_answer(text: str) -> bool | None:
    """Whether an answer says yes: its first word, without case and punctuation. None if that is neither yes nor no."""
    words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
    return {"yes": True, "no": False}.get(words[0]) if words else None


def groups_of(category: str) -> list[str]:
    """A category and the group that it belongs to, such as "attribute - color" and "attribute"."""
    return list(dict.fromkeys((category.split("-")[0].strip(), category)))


@dataclass
class ScoreSums:
    """Sums over judged pictures, filled picture by picture."""

    prompts: dict[str, list[float]] = field(default_factory=dict)  # sum of scores, and pictures
    categories: dict[str, list[int]] = field(default_factory=dict)  # questions answered with yes, and questions

    def add(self, prompt: str, score: float, answers: Sequence[tuple[str, bool]]) -> None:
        """Count a picture. `answers`: category and answer of each question, before dependencies are applied."""
        total = self.prompts.setdefault(prompt, [0.0, 0])
        total[0], total[1] = total[0] + score, total[1] + 1
        for category, is_yes in answers:
            for name in groups_of(category):
                sums = self.categories.setdefault(name, [0, 0])
                sums[0], sums[1] = sums[0] + is_yes, sums[1] + 1

    def figures(self) -> dict[str, float]:
        """`score`: the mean over the prompts of the mean over a prompt's pictures; and the share of yes of each category and
        group of categories. All are 0 to 100; empty if nothing was counted.

        The published code takes the categories from the last of a prompt's pictures alone; here all pictures count.
        """
        if not self.prompts:
            return {}
        means = [total / count for total, count in self.prompts.values()]
        shares = {name: 100 * yes / count for name, (yes, count) in sorted(self.categories.items())}
        return {"score": 100 * sum(means) / len(means), **shares}
