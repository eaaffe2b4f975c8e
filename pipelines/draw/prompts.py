"""Prompts: given in a configuration, read from files of many forms, or a published set by its name."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.storage.files import find_files, read_file
from pipelines.tables.schema import Row
from pipelines.tables.text import read_text

SHIPPED_DIR = Path(__file__).parent / "prompt_sets"
SHIPPED = ("geneval", "dpg-bench", "partiprompts", "imagereward")
ELSEWHERE: Mapping[str, tuple[str | None, str]] = {
    "mjhq-30k": (
        "hf://datasets/playgroundai/MJHQ-30K/meta_data.json",
        "meta_data.json of playgroundai/MJHQ-30K on the Hugging Face hub",
    ),
    "coco-30k": (None, "a file with the 30,000 captions of COCO 2014 that you compare with, one on each line"),
    "drawbench": (None, "DrawBench's CSV, with the columns Prompts and Category"),
}
"""Sets that are not shipped: where they are read from (None: only from a file that is given), and what that file is."""
SETS = (*SHIPPED, *ELSEWHERE)

FILE_NAME = re.compile(r"\S*[/\\.]\S*\w|.*\.(txt|csv|tsv|json|jsonl|list|prompts)", re.IGNORECASE)
PROMPT_KEYS = ("prompt", "prompts", "caption", "text")
"""Names of the field that holds a prompt, in any case; the first that is there counts."""
ID_KEYS = ("id", "prompt_id", "item_id")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order; and, where their source says more than the texts, the id and the metadata of each."""

    prompts: list[str]
    ids: list[str] | None = None
    metadata: list[str] | None = None
    """A JSON object for each prompt."""

    def spread(self, count: int | None) -> "PromptSet":
        """So many of the prompts, spread evenly over all of them, in order; None: all."""
        total = len(self.prompts)
        if count is None or count >= total:
            return self
        chosen = [number * total // count for number in range(count)]
        ids, metadata = (None if texts is None else [texts[number] for number in chosen] for texts in (self.ids, self.metadata))
        return PromptSet([self.prompts[number] for number in chosen], ids, metadata)

    @property
    def hash(self) -> str | None:
        """Of ids and metadata; None if there are none."""
        if self.ids is None:
            return None
        return hashlib.sha256(json.dumps([self.ids, self.metadata]).encode()).hexdigest()[:16]


def read_prompt_set(prompts: list[str] | str) -> PromptSet:
    """The prompts of a configuration.

    Args:
        prompts: a list; the name of a set (SETS); the path or URI of a file (a prompt on each line; JSON lines, JSON, CSV or
            TSV with a field `prompt`) or of a folder of .txt files with a prompt in each; or a prompt itself, or several on
            lines of their own. Blank prompts are left out.

    Raises:
        FileNotFoundError: a text that looks like the name of a file, and there is no such file; or a set that is not here.
        ValueError: no prompt is left, or a file cannot be read as what its name says.
    """
    if isinstance(prompts, str):
        found = read_named(prompts) if prompts.strip().lower() in SETS else _read_text_or_file(prompts)
    else:
        found = _plain(prompts)
    if not found.prompts:
        raise ValueError(f"prompts={prompts!r} holds no prompt: give at least one that is not blank")
    return found


def names_file(text: str) -> bool:
    """Whether a text is taken for the name of a file, a folder or a set, and not for a prompt."""
    try:
        if text.strip().lower() in SETS or "://" in text or FILE_NAME.fullmatch(text):
            return True
        return bool(text.strip()) and Path(text).exists()
    except (OSError, ValueError):  # longer than any name
        return False


def read_named(name: str) -> PromptSet:
    """A published set by its name. Raises FileNotFoundError, with what to do, if it is not shipped and cannot be reached."""
    name = name.strip().lower()
    if name in SHIPPED:
        return _of_rows(_json_lines(str(SHIPPED_DIR / f"{name}.jsonl")), name)
    uri, what = ELSEWHERE[name]
    advice = f"give the path or URI of {what}, as sample.prompts"
    if uri is None:
        raise FileNotFoundError(f"the prompts of {name} are not shipped: {advice}")
    try:
        return _read_file(uri)
    except Exception as error:  # of the hub's library, the network, or the storage
        raise FileNotFoundError(
            f"the prompts of {name} are not shipped, and {uri} cannot be read ({error}): {advice}"
        ) from error


def _plain(lines: Sequence[str]) -> PromptSet:
    return PromptSet([line.strip() for line in lines if line.strip()])


def _read_text_or_file(text: str) -> PromptSet:
    """The prompts of the file or folder that a text names, or of the text itself if it names none."""
    if not names_file(text):
        return _plain(text.splitlines())
    if "://" in text or Path(text).is_file():
        return _read_file(text)
    if Path(text).is_dir():
        return _read_folder(text)
    raise FileNotFoundError(f"there is no file {text!r}; a prompt that looks like a name is given as [prompt]")


def _read_folder(folder: str) -> PromptSet:
    """DPG-Bench's layout: a prompt in each .txt file, whose name is the prompt's id."""
    names = sorted(name for name in find_files(folder) if name.lower().endswith(".txt"))
    if not names:
        raise ValueError(
            f"prompts={folder!r} is a folder without .txt files; a prompt that has the name of a folder is given as [prompt]"
        )
    ids = [str(PurePosixPath(name).with_suffix("")) for name in names]
    texts = [" ".join(read_text(f"{folder.rstrip('/')}/{name}").split()) for name in names]
    return _of_rows([{"id": name, "prompt": text} for name, text in zip(ids, texts, strict=True)], folder)


def _read_file(uri: str) -> PromptSet:
    """The prompts of a file, read as the end of its name says."""
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix == ".jsonl":
        return _of_rows(_json_lines(uri), uri)
    if suffix == ".json":
        return _of_rows(_json_rows(_parse(read_file(uri), uri)), uri)
    text = read_text(uri)
    if suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
        if rows and _key(rows[0], PROMPT_KEYS) is not None:
            return _of_rows([{str(name): value for name, value in row.items()} for row in rows], uri)
    return _plain(text.splitlines())


def _json_lines(uri: str) -> list[Any]:
    return [_parse(line, f"{uri}, line {number}") for number, line in enumerate(read_text(uri).splitlines(), 1) if line.strip()]


def _parse(content: str | bytes, source: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source} is no JSON: {error}") from error


def _json_rows(content: Any) -> list[Any]:
    """The rows of a JSON file: a list; COCO's {"annotations": [...]}; or, as MJHQ-30K's, an object by id."""
    if isinstance(content, dict):
        annotations = content.get("annotations")
        if isinstance(annotations, list):
            return annotations
        return [{"id": name, **row} if isinstance(row, dict) else {"id": name, "prompt": row} for name, row in content.items()]
    return content if isinstance(content, list) else []


def _of_rows(rows: Sequence[Any], source: str) -> PromptSet:
    """Prompts with ids and metadata from rows; a row may also be the prompt alone. Raises ValueError for a row without any."""
    found: list[tuple[str, str, Row]] = []
    for number, row in enumerate(rows):
        fields: Row = {"prompt": row} if isinstance(row, str) else dict(row) if isinstance(row, dict) else {}
        key, id_key = _key(fields, PROMPT_KEYS), _key(fields, ID_KEYS)
        prompt = fields.pop(key) if key is not None else None
        if not isinstance(prompt, str):
            raise ValueError(f"{source}, row {number}: it has no text under {' or '.join(PROMPT_KEYS)}")
        row_id = str(fields.pop(id_key)) if id_key is not None else f"{number:05d}"
        if prompt.strip():
            found.append((row_id, prompt.strip(), fields))
    return PromptSet(
        [prompt for _, prompt, _ in found],
        [row_id for row_id, _, _ in found],
        [json.dumps(fields, ensure_ascii=False) for _, _, fields in found],
    )


def _key(fields: Mapping[Any, Any], wanted: Sequence[str]) -> str | None:
    """The name of the first wanted field that is there, in any case."""
    by_lower = {str(name).lower(): name for name in reversed(list(fields))}
    return next((by_lower[name] for name in wanted if name in by_lower), None)
