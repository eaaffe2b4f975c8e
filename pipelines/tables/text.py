"""Pure functions of a caption's text."""

from typing import Any


def clean(caption: str | None) -> str | None:
    """Strip white space and replace what UTF-8 cannot hold by "?". Returns None if nothing is left."""
    return (caption.strip().encode(errors="replace").decode() or None) if caption else None


def first_caption(value: Any) -> str | None:
    """The caption in a value that was read from a file: of a list the first that is a text and not empty. None: it has none."""
    texts = value if isinstance(value, list) else [value]
    return next((caption for text in texts if isinstance(text, str) and (caption := clean(text))), None)
