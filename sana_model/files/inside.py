"""Keeps foreign names (of a bucket, an archive, an index, a configuration) below the folder that they are appended to."""

import unicodedata
from pathlib import Path

LONGEST_PART = 255  # bytes, of the file systems in use


def check_inside(name: str) -> str:
    """Return a relative name. Raises ValueError if it may lead out of the folder that it is appended to, or cannot be a file.

    Backslashes count as slashes, as on Windows.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0]:
        raise ValueError(f"the name {name!r} is {'absolute' if name else 'empty'}: it must be relative, as in 'folder/file'")
    if ".." in parts:
        raise ValueError(f"the name {name!r} leads out of its folder: it must not contain '..'")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ValueError(f"the name {name!r} holds control characters, or bytes that are no text")
    if longest := next((part for part in parts if len(part.encode()) > LONGEST_PART), None):
        raise ValueError(f"the name {longest[:40]!r}... is longer than {LONGEST_PART} bytes")
    return name


def path_inside(folder: Path, name: str) -> Path:
    """The local path of a foreign name below `folder`.

    Raises ValueError as `check_inside`, and if a symbolic link there leads out of `folder`.
    """
    path = folder / check_inside(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the name {name!r} leads out of {folder} by a symbolic link")
    return path
