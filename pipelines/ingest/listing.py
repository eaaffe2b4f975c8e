"""Lists the files of a source, with links followed and without what systems hide among people's files."""

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from stat import S_ISDIR, S_ISREG

from pipelines.ingest.not_taken import LINKED_FOLDER, SPECIAL, UNREADABLE_FOLDER, kind_of_name
from pipelines.storage.files import find_files, is_local
from pipelines.storage.retry import call
from sana_model.files.filesystems import open_filesystem


@dataclass
class Listing:
    """Files by their path relative to the root, with their size in bytes; and what else is there, by kind.

    The size of a link that leads nowhere is 0.
    """

    files: dict[str, int] = field(default_factory=dict)
    not_taken: Counter[str] = field(default_factory=Counter)


def list_files(root: str, name: str | None, exclude: str | None) -> Listing:
    """List the files below a folder, at any depth, or one file of it. What does not exist is empty.

    Hidden files and folders, those of systems, pipes, sockets and devices are counted, and not listed.

    Args:
        root: URI of the folder.
        name: of the only file that is meant; None: all.
        exclude: URI of a folder in which nothing is looked for, as if it were not there, unless `root` lies in it.
    """
    filesystem, path = open_filesystem(root)
    excluded = open_filesystem(exclude)[1] if exclude else None
    if excluded and f"{path}/".startswith(f"{excluded}/"):  # a folder inside the dataset, given by name, is meant
        excluded = None
    found = Listing()
    if is_local(root):
        call(lambda: _Walk(path, excluded, found).run(name), "list", root)
    elif name is not None:
        with suppress(FileNotFoundError):
            found.files[name] = call(lambda: filesystem.size(f"{path}/{name}"), "read", f"{root}/{name}") or 0
    else:
        _list_remote(root, path, excluded, found)
    found.files = dict(sorted(found.files.items()))
    return found


def _list_remote(root: str, path: str, excluded: str | None, found: Listing) -> None:
    try:
        files = find_files(root)
    except FileNotFoundError:  # no such bucket
        return
    left_out: dict[str, str] = {}
    for relative, size in files.items():
        names = relative.split("/")
        kinds = [kind_of_name(name) for name in names]
        place = next((place for place, kind in enumerate(kinds) if kind), None)
        if excluded and f"{path}/{relative}".startswith(f"{excluded}/"):
            continue
        if place is None:
            found.files[relative] = size
        else:
            left_out["/".join(names[: place + 1])] = kinds[place] or ""
    found.not_taken.update(left_out.values())


class _Walk:
    """Walks through a local folder. Each folder is visited once, whatever links lead to it."""

    def __init__(self, root: str, excluded: str | None, found: Listing):
        self.root, self.found = root, found
        self.excluded = _identity(excluded) if excluded and os.path.exists(excluded) else None
        self.visited: set[tuple[int, int]] = set()
        self.linked: list[str] = []

    def run(self, name: str | None) -> None:
        """List all files, or one. Folders come before the links to them."""
        self.found.files.clear()
        self.found.not_taken.clear()
        if name is not None:
            self._add(name, os.path.join(self.root, name))
            return
        if os.path.isdir(self.root):
            self._visit("")
        while self.linked:
            self.linked.sort()
            self._visit(self.linked.pop(0))

    def _visit(self, start: str) -> None:
        """List the folder `start` ("" is the root) and those in it."""
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            path = os.path.join(self.root, folder) if folder else self.root
            try:
                identity = _identity(path)
                if identity == self.excluded:
                    continue
                if identity in self.visited:
                    self.found.not_taken[LINKED_FOLDER] += 1
                    continue
                self.visited.add(identity)
                with os.scandir(path) as entries:
                    for entry in entries:
                        self._sort(f"{folder}/{entry.name}" if folder else entry.name, entry, waiting)
            except PermissionError:
                self.found.not_taken[UNREADABLE_FOLDER] += 1

    def _sort(self, relative: str, entry: os.DirEntry[str], waiting: list[str]) -> None:
        if kind := kind_of_name(entry.name):
            self.found.not_taken[kind] += 1
        elif entry.is_dir(follow_symlinks=False):
            waiting.append(relative)
        elif entry.is_symlink() and entry.is_dir():
            self.linked.append(relative)
        else:
            self._add(relative, entry.path)

    def _add(self, relative: str, path: str) -> None:
        try:
            facts = os.stat(path)
        except OSError:  # a link that leads nowhere, or to itself
            if os.path.islink(path):
                self.found.files[relative] = 0
            return
        if S_ISREG(facts.st_mode):
            self.found.files[relative] = facts.st_size
        elif not S_ISDIR(facts.st_mode):
            self.found.not_taken[SPECIAL] += 1


def _identity(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino
