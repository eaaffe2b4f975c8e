"""Reads the files beside an image: its caption, and other metadata as a JSON object."""

import json
from collections.abc import Mapping
from typing import Any

from pipelines.ingest.sources import CAPTION_COLUMNS
from pipelines.tables.schema import Row
from pipelines.tables.text import clean


def read_sidecars(sidecars: Mapping[str, bytes | Exception]) -> Row:
    """Read `caption` and `metadata` from an image's sidecars by their ending. The .txt's caption goes before the .json's."""
    caption, metadata = None, {}
    content = sidecars.get(".json")
    if isinstance(content, bytes):
        try:
            metadata = json.loads(content)
            if not isinstance(metadata, dict):
                metadata = {"sidecar_error": f"the .json holds a {type(metadata).__name__}, not an object"}
        except (ValueError, RecursionError) as error:
            metadata = {"sidecar_error": f".json: {error}"}
    content = sidecars.get(".txt")
    if isinstance(content, bytes):
        caption = clean(content.decode("utf-8-sig", errors="replace"))
    if caption is None:
        named = [name for name in CAPTION_COLUMNS if isinstance(metadata.get(name), str)]
        caption = clean(metadata.pop(named[0])) if named else None
    failed = [f"{ending}: {error}" for ending, error in sidecars.items() if isinstance(error, Exception)]
    if failed:
        metadata["sidecar_error"] = "; ".join(failed)
    return {"caption": caption, "metadata": to_json(metadata)}


def to_json(metadata: Mapping[str, Any]) -> str | None:
    """Write the values that are not None as strict JSON. Types that JSON does not have become text, NaN becomes null."""
    present = {name: value for name, value in metadata.items() if value is not None}
    loose = json.dumps(present, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    return json.dumps(json.loads(loose, parse_constant=lambda name: None)) if present else None
