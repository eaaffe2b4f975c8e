"""Names that MLflow takes: of parameters, metrics, tags and datasets."""

import hashlib
import posixpath
import re
from collections.abc import Mapping
from typing import Any

MAX_NAME = 250
"""The longest name, in characters."""
REFUSED = re.compile(r"[^\w\-. :/]")
"""Characters that no name may have."""


def safe_name(name: str) -> str:
    """The name itself if MLflow takes it; otherwise one like it, which ends in a hash of it where that is needed to tell it
    from others.

    MLflow takes letters, digits and `_-. :/`, at most MAX_NAME characters, and what is also a path in its simplest form.
    """
    wanted = name.replace("://", ":/")
    plain = REFUSED.sub("_", posixpath.normpath(wanted).lstrip("/")) if name else ""
    if plain == wanted and plain != "." and not plain.startswith("..") and 0 < len(plain) <= MAX_NAME:
        return plain
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain.lstrip('.')[: MAX_NAME - 9]}-{digest}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists of dicts to one dict with dotted names."""
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, Mapping) for inner in value):
        entries = list(enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in entries:
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat
