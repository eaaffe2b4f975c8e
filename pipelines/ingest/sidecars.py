"""Reads the files beside an image: its caption, and other metadata as a JSON object."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from posixpath import splitext
from typing import Any

from pipelines.ingest.not_taken import BAD_SIDE_FILE, LARGE_SIDE_FILE, LARGE_TEXT, ODD_CAPTION, UNKNOWN_ENCODING
from pipelines.tables import encodings
from pipelines.tables.encodings import decode_caption, decode_text
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.text import clean, first_caption

CAPTION_COUNTS = "num_captions/"
"""Begins the figures of `images` that count captions by the key under which they were found."""
TEXT_FILES = (".txt", ".caption")
SIDECARS = (".txt", ".json", ".caption")
"""Endings, in any case, of files that may lie beside an image: its caption, and other metadata."""
MAX_DEPTH = 100  # of nested JSON; Python's own readers give up at a thousand, and sooner inside other calls
LEFT_OUT_BYTES = 40  # of the text that stands for a value
SIDECAR_ERROR = "sidecar_error"  # key in the metadata of an image whose side files could not be read


def read_sidecars(
    sidecars: Mapping[str, bytes | RowRefused], caption_keys: Sequence[str], max_bytes: int, encoding: str | None
) -> Row:
    """Read `caption`, `caption_key`, `metadata` and `not_taken` from an image's side files by their ending, in lower case.

    The first of .txt, .caption and .json that has a caption gives it. What else is in these files goes into the metadata, which
    has at most `max_bytes`. `encoding`: as in `decode_caption`.
    """
    not_taken: Counter[str] = Counter()
    problems: list[str] = []
    metadata: Row = {}
    texts: dict[str, str] = {}
    for ending, content in sidecars.items():
        try:
            if isinstance(content, RowRefused):
                raise content
            if ending in TEXT_FILES:
                if text := clean(decode_caption(content, encoding)):
                    texts[ending] = text
            else:
                metadata = _read_object(content)
        except RowRefused as refused:
            problems.append(f"{ending}: {refused.detail}")
            is_text = refused.reason == encodings.UNKNOWN_ENCODING and ending in TEXT_FILES
            is_large = refused.reason == "too_many_bytes"
            not_taken[UNKNOWN_ENCODING if is_text else LARGE_SIDE_FILE if is_large else BAD_SIDE_FILE] += 1
    found: Row = {"caption": None}
    for ending in (ending for ending in TEXT_FILES if ending in texts):
        if found["caption"]:
            metadata.setdefault(ending, texts[ending])
        else:
            found = {"caption": texts[ending], "caption_key": ending}
    if not found["caption"]:
        found = take_caption(metadata, find_captions(metadata, caption_keys), max_bytes, encoding)
        not_taken += found["not_taken"]
        named = {name.lower() for name, value in metadata.items() if isinstance(value, dict | list) and value}
        if found["caption_key"] is None and not found["not_taken"] and named & {key.lower() for key in caption_keys}:
            not_taken[ODD_CAPTION] += 1
    if problems:
        metadata[SIDECAR_ERROR] = "; ".join(problems)
    return found | {"metadata": to_json(metadata, max_bytes), "not_taken": not_taken}


def split_sidecar(path: str) -> tuple[str, str] | None:
    """The stem of a side file, and its ending in lower case. None: the file is none.

    The stem is that of the image ("a.txt" for "a.jpg"), or its whole name ("a.jpg.txt").
    """
    stem, ending = splitext(path)
    return (stem, ending.lower()) if ending.lower() in SIDECARS else None


def _read_object(content: bytes) -> Row:
    """Raises RowRefused: it is no JSON object."""
    try:
        metadata = load_json(content)
    except (ValueError, RecursionError) as error:
        raise RowRefused("bad_json", str(error)) from error
    if not isinstance(metadata, dict):
        raise RowRefused("bad_json", f"it holds a {type(metadata).__name__}, not an object")
    return metadata


def load_json(content: bytes | str) -> Any:
    """Parse JSON. An integer too long for Python becomes a text, and the second "key" of an object "key (2)".

    Raises ValueError, RecursionError; RowRefused if bytes are of an unknown encoding.
    """
    if isinstance(content, bytes):
        unmarked = json.detect_encoding(content)  # by the zero bytes of UTF-16 and UTF-32
        is_wide = unmarked in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
        content = content.decode(unmarked) if is_wide else decode_text(content)
    return json.loads(content, parse_int=_parse_int, object_pairs_hook=_unique_keys)


def _parse_int(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # Python's limit is 4300 digits
        return digits


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    found = {}
    for key, value in pairs:
        name, number = key, 1
        while name in found:
            number += 1
            name = f"{key} ({number})"
        found[name] = value
    return found


def find_captions(metadata: Row, caption_keys: Sequence[str]) -> list[str]:
    """The keys of an object that may hold its caption: those of `caption_keys`, in any case, with a text or a list of texts."""
    there = {name.lower(): name for name in reversed(metadata)}
    there |= {name: name for name in metadata}
    named = [there[key] for key in (name if name in there else name.lower() for name in caption_keys) if key in there]
    return [name for name in named if _holds_captions(metadata[name])]


def _holds_captions(value: object) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    return all(isinstance(text, str) for text in texts)


def _has_text(value: object) -> bool:
    """Whether there is something to be seen in a text, in a list of texts, or in texts as bytes."""
    texts = value if isinstance(value, list) else [value]
    return any(bool(text.strip()) if isinstance(text, bytes) else isinstance(text, str) and clean(text) for text in texts)


def take_caption(row: Row, keys: Sequence[str], max_bytes: int, encoding: str | None) -> Row:
    """Take the caption out of a row, as `caption` and `caption_key`. Of a list of captions it is the first; the list stays.

    Texts as bytes are decoded. One in an unknown encoding, or a larger one, is none, and counted in `not_taken`.

    Args:
        keys: where the caption may be; the first that is not empty has it.
        max_bytes: of a text.
        encoding: as in `decode_caption`.
    """
    key = next((key for key in keys if _has_text(row.get(key))), next(iter(keys), None))
    value = row.pop(key, None) if key else None
    if key and value is not None and not isinstance(value, str | bytes | list):
        row[key] = value
        return {"caption": None, "caption_key": None, "not_taken": Counter([ODD_CAPTION])}
    texts: list[Any] = []
    not_taken: Counter[str] = Counter()
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str | bytes) and len(text) > max_bytes:
            not_taken[LARGE_TEXT] += 1
            continue
        try:
            if isinstance(text, str) and "\ufffd" in text:
                raise RowRefused(encodings.UNKNOWN_ENCODING, "characters of it were lost before")
            texts.append(decode_caption(text, encoding) if isinstance(text, bytes) else text)
        except RowRefused:
            not_taken[UNKNOWN_ENCODING] += 1
    if key and isinstance(value, list):
        row[key] = texts
    caption = first_caption(texts)
    return {"caption": caption, "caption_key": key if caption else None, "not_taken": not_taken}


def to_json(metadata: Mapping[str, Any], max_bytes: int) -> str | None:
    """Write the values that are not None as strict JSON. Types that JSON does not have become text, NaN becomes null.

    A value that is nested deeper than MAX_DEPTH becomes a text that says so: it could be written, and not read again. So do
    the largest values, if all together have more than `max_bytes`.
    """
    present = {name: _fitting(name, value, max_bytes) for name, value in metadata.items() if value is not None}
    try:
        content = _write_json(present)
    except RecursionError:
        content = ""
    if not content or _depth(content) > MAX_DEPTH:
        content = _write_json({name: _shallow(value) for name, value in present.items()})
    if len(content) > max_bytes:
        content = _write_json(_without_largest(json.loads(content), max_bytes))
    return content if present else None


def _fitting(name: str, value: Any, max_bytes: int) -> Any:
    """A value, unless it is a text that is larger than all may be together: writing it takes several times its size."""
    is_large = isinstance(value, str) and len(value) > max_bytes
    return _left_out(len(name) + len(value) + 2) if is_large else value


def _left_out(size: int) -> str:
    return f"<{size} bytes, left out>"


def _without_largest(values: Row, max_bytes: int) -> Row:
    sizes = {name: len(name) + len(json.dumps(value)) for name, value in values.items()}
    kept: Row = {}
    for name in sorted(sizes, key=lambda name: sizes[name]):
        max_bytes -= min(sizes[name], LEFT_OUT_BYTES + len(name))
        if max_bytes < 0:
            break  # even the names are too much
        is_small = sizes[name] <= max_bytes
        kept[name] = values[name] if is_small else _left_out(sizes[name])
        max_bytes -= sizes[name] if is_small else 0
    return kept


def _write_json(value: Any) -> str:
    loose = json.dumps(value, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    return json.dumps(json.loads(loose, parse_constant=lambda name: None))


def _shallow(value: Any) -> Any:
    try:
        content = _write_json(value)
    except RecursionError:
        content = ""
    return json.loads(content) if content and _depth(content) < MAX_DEPTH else f"<nested deeper than {MAX_DEPTH}>"


def _depth(content: str) -> int:
    """How deeply JSON is nested."""
    if content.count("[") + content.count("{") <= MAX_DEPTH:
        return 0  # not deeper than that
    depth = deepest = 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', content):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
        deepest = max(deepest, depth)
    return deepest
