"""What a source holds and ingest does not take, counted by kind, so that nothing vanishes without a word.

What is refused by itself, as a row, is in the table of rejects. All else is counted under these kinds: what the shards' readers
find in `figures` of the shards, and other files of the source in those of the finished table.
"""

import re
from collections import Counter
from collections.abc import Mapping
from posixpath import basename, splitext

IN_SHARDS = "num_not_taken/"
"""Begins the figures of `images` that count what archives, tables and side files hold and is not taken, by kind."""
AMONG_FILES = "num_files_not_taken/"
"""Begins the figures of `images` that count the files of the source that are not taken, by kind."""

UNKNOWN_ENCODING = "captions in an unknown encoding"
ODD_CAPTION = "captions that are neither a text nor texts"
UNCERTAIN_PAIR = "captions that may belong to several images"
BAD_VALUE = "values that cannot be read"
BAD_SIDE_FILE = "side files that cannot be read"
LARGE_TEXT = "texts that are too large"
LARGE_SIDE_FILE = "side files that are too large"
LONE_SIDE_FILE = "side files without an image"
SECOND_SIDE_FILE = "second side files of the same kind"
BINARY_COLUMN = "columns of bytes beside the images"
TRAILING_BYTES = "tars with other bytes behind them"
NO_IMAGE = "files without an image in them"
HIDDEN = "hidden files and folders"
SYSTEM = "files and folders of operating systems"
SPECIAL = "pipes, sockets and devices"
DEAD_LINK = "links that lead nowhere"
LINKED_FOLDER = "links to folders that are read already"
UNREADABLE_FOLDER = "folders that may not be read"

SYSTEM_NAMES = frozenset(
    {"@eadir", "#recycle", "@recycle", "#snapshot", "@tmp", "$recycle.bin", "recycler", "system volume information"}
    | {"__macosx", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
"""Folders and files that Synology and QNAP, Windows and macOS put among people's files; in lower case."""
_PLAIN_ENDING = re.compile(r"\.(?=[a-z0-9_-]{0,9}[a-z])[a-z0-9_-]{1,10}")


def kind_of_name(name: str) -> str | None:
    """HIDDEN or SYSTEM, if a file or folder is of that kind by its name."""
    if name.lower() in SYSTEM_NAMES:
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def kind_of_path(path: str) -> str | None:
    """HIDDEN or SYSTEM, if a file, or a folder on its path, is of that kind."""
    return next((kind for name in path.split("/") if (kind := kind_of_name(name))), None)


def kind_of_ending(path: str) -> str:
    """The kind of a file that nothing here reads."""
    ending = splitext(basename(path))[1].lower()
    if not ending:
        return "files without an ending"
    return f"{ending} files" if _PLAIN_ENDING.fullmatch(ending) else "files with other endings"


def figures_of(counts: Mapping[str, int], prefix: str) -> dict[str, float]:
    """Counts by kind as figures of a shard or a table."""
    return {f"{prefix}{kind}": float(count) for kind, count in counts.items()}


def describe_not_taken(figures: Mapping[str, float]) -> str:
    """What was not taken, most frequent first; empty if all was."""
    counts: Counter[str] = Counter()
    for name, count in figures.items():
        for prefix in (IN_SHARDS, AMONG_FILES):
            if name.startswith(prefix):
                counts[name.removeprefix(prefix)] += int(count)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
