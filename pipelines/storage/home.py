"""The sign ~ for the home folder, in paths and URIs of local files."""

import os
import re

HOME = re.compile(r"((?:file|local)://|sqlite:///)?(~[\w.-]*(?=/|$).*)", re.DOTALL)


def expand_home(path: str) -> str:
    """A path, or the URI of a local file or SQLite database, with the home folder for a leading ~ (~name: a user's)."""
    if "~" not in path or (match := HOME.fullmatch(path)) is None:
        return path
    return (match[1] or "") + os.path.expanduser(match[2])
