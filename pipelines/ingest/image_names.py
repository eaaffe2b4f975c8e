"""Which files are images, by their names, and by their first bytes where names do not say."""

import re
from posixpath import basename, splitext

from PIL import Image

from pipelines.workers.images import EXTENSIONS, FORMATS, SIGNATURES

HEAD_BYTES = 32  # of a file, by which images are known
_QUERY = re.compile(r"\?[^/]*$")


def without_query(path: str) -> str:
    """A path without the query of the URL that it was saved from, as in "a.jpg?width=200"."""
    return _QUERY.sub("", path)


def split_image(path: str) -> tuple[str, str] | None:
    """The stem of an image's path and its ending in lower case, without a query ("a.jpg?width=200"). None: it is none."""
    for name in (path, without_query(path)):
        stem, ending = splitext(name)
        if ending.lower() in EXTENSIONS:
            return stem, ending.lower()
    return None


def has_no_ending(path: str) -> bool:
    """Whether a file's name does not say what it is: only its first bytes do."""
    return not splitext(without_query(basename(path)))[1]


def looks_like_image(head: bytes) -> bool:
    """Whether the first HEAD_BYTES of a file are those of an image, of a format that is decoded or one that is refused."""
    Image.init()
    if any(head.startswith(signature, offset) for offset, signature, _ in SIGNATURES if len(signature) > 3):
        return True
    return any(accept is not None and bool(accept(head)) for _, accept in (Image.OPEN[name] for name in FORMATS))
