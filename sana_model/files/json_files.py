"""Read JSON, and tell files that stand in for what should be there. Imports no torch, so a command line may read with it."""

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, name: str | Path) -> Any:
    """Parse the JSON of the file `name`. Raises ValueError that names the file, also if it is nested too deeply."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}): the file is damaged or incomplete") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply to be what it should be: its JSON has hundreds of levels") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError that names the file if it is damaged or holds something else."""
    if stand_in := find_stand_in(path):
        raise ValueError(f"{path} is {stand_in}")
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def find_stand_in(path: Path) -> str | None:
    """Say what a file holds in place of its content, and what to do; None if it is nothing that is known."""
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it again"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file itself: download it again, from the address of the file"
    return None if start else "empty: download it again"
