"""Reads the files beside an image: its caption, and other metadata as a JSON object."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.tables.schema import Row
from pipelines.tables.text import clean, first_caption

CAPTION_COUNTS = "num_captions/"
"""Begins the figures of `images` that count captions by the key under which they were found."""
TEXT_FILE = ".txt"


def read_sidecars(sidecars: Mapping[str, bytes | Exception], caption_keys: Sequence[str]) -> Row:
    """Read `caption`, `caption_key` and `metadata` from an image's sidecars by their ending. A .txt goes before a .json."""
    caption, metadata = None, {}
    content = sidecars.get(".json")
    if isinstance(content, bytes):
        try:
            metadata = json.loads(content)
            if not isinstance(metadata, dict):
                metadata = {"sidecar_error": f"the .json holds a {type(metadata).__name__}, not an object"}
        except (ValueError, RecursionError) as error:
            metadata = {"sidecar_error": f".json: {error}"}
    content = sidecars.get(TEXT_FILE)
    if isinstance(content, bytes):
        caption = clean(content.decode("utf-8-sig", errors="replace"))
    found: Row = {"caption": caption, "caption_key": TEXT_FILE}
    if caption is None:
        found = take_caption(metadata, find_caption(metadata, caption_keys))
    failed = [f"{ending}: {error}" for ending, error in sidecars.items() if isinstance(error, Exception)]
    if failed:
        metadata["sidecar_error"] = "; ".join(failed)
    return found | {"metadata": to_json(metadata)}


def find_caption(metadata: Row, caption_keys: Sequence[str]) -> str | None:
    """The key of an object that holds its caption: the first of `caption_keys`, in any case, with a text or a list of texts."""
    there = {name.lower(): name for name in reversed(metadata)}
    there |= {name: name for name in metadata}
    named = [there[key] for key in (name if name in there else name.lower() for name in caption_keys) if key in there]
    return next((name for name in named if _holds_captions(metadata[name])), None)


def _holds_captions(value: object) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    return all(isinstance(text, str) for text in texts)


def take_caption(row: Row, key: str | None) -> Row:
    """Take the caption out of a row, as `caption` and `caption_key`. Of a list of captions it is the first; the list stays.

    Args:
        key: where the caption is; None: the row has none.
    """
    value = row.get(key) if key else None
    if key and not isinstance(value, list):
        row.pop(key, None)
    caption = first_caption(value)
    return {"caption": caption, "caption_key": key if caption else None}


def to_json(metadata: Mapping[str, Any]) -> str | None:
    """Write the values that are not None as strict JSON. Types that JSON does not have become text, NaN becomes null."""
    present = {name: value for name, value in metadata.items() if value is not None}
    loose = json.dumps(present, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    return json.dumps(json.loads(loose, parse_constant=lambda name: None)) if present else None
