"""Finds the images among the members of a tar, and the side files that belong to each."""

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from posixpath import dirname, normpath

from pipelines.ingest.image_names import split_image
from pipelines.ingest.not_taken import (
    DEAD_LINK,
    LINKED_FOLDER,
    LONE_SIDE_FILE,
    SECOND_SIDE_FILE,
    SPECIAL,
    UNCERTAIN_PAIR,
    kind_of_ending,
    kind_of_path,
)
from pipelines.ingest.sidecars import split_sidecar

MAX_LINKS = 16  # of a link to a link


@dataclass
class Member:
    """A member of a tar that is an image (`side_ending` is empty) or a side file.

    Args:
        name: without "./" and the like.
        target: its content, which for a link is another member's; None if the link leads nowhere.
        key: what an image and its side files have in common: the path without the ending.
        stem: of a side file: the key of its images, or the whole name of its only image.
        image: that it is, if it is one.
    """

    name: str
    target: tarfile.TarInfo | None
    key: str
    side_ending: str = ""
    stem: str = ""
    image: "TarImage | None" = None


@dataclass
class TarImage:
    """An image of a tar (`member` is None if it is a link that leads nowhere), and its side files by lower-case ending."""

    name: str
    member: tarfile.TarInfo | None
    beside: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def find_images(members: Sequence[tarfile.TarInfo], sniffed: set[int], not_taken: Counter[str]) -> list[TarImage]:
    """The images of a tar in order, and beside each its side files. What is neither is counted in `not_taken`.

    Args:
        members: all of the archive.
        sniffed: places of members whose name has no ending, and whose content is an image.
    """
    images: list[TarImage] = []
    samples: defaultdict[str, list[tuple[int, Member]]] = defaultdict(list)
    run, last_key = 0, None
    for member in _sort(members, sniffed, not_taken):
        run, last_key = run + (member.key != last_key), member.key
        samples[member.key].append((run, member))
        if member.image is not None:
            images.append(member.image)
    for sample in samples.values():
        names = Counter(member.name for _, member in sample)
        groups = [[member for _, member in sample]] if max(names.values()) == 1 else _split(sample)
        if groups is None:
            not_taken[UNCERTAIN_PAIR] += sum(member.image is None for _, member in sample)
        for group in groups or ():
            _pair(group, not_taken)
    return images


def _sort(members: Sequence[tarfile.TarInfo], sniffed: set[int], not_taken: Counter[str]) -> Iterator[Member]:
    """The images and side files among the members."""
    files: dict[str, tarfile.TarInfo] = {}
    links = {normpath(member.name): member for member in members if member.issym()}
    later: dict[str, tarfile.TarInfo] = {}  # a symbolic link may come before its file
    for member in members:
        if content := member if _is_file(member) else later.get(normpath(member.linkname)) if member.islnk() else None:
            later[normpath(member.name)] = content
    folders = {normpath(member.name) for member in members if member.isdir()}
    for place, member in enumerate(members):
        name = normpath(member.name)
        target: tarfile.TarInfo | None = member
        if member.issym():
            path, target = _follow(member, links, later)
        elif member.islnk():
            path = normpath(member.linkname)
            target = files.get(path) or later.get(path)
        if target is not None:
            files[name] = target
        split, side = split_image(name), split_sidecar(name)
        if member.isdir():
            continue
        if kind := kind_of_path(name):
            not_taken[kind] += 1
        elif member.issym() and path in folders:
            not_taken[LINKED_FOLDER] += 1
        elif not (member.issym() or member.islnk() or _is_file(member)):
            not_taken[SPECIAL] += 1
        elif split or place in sniffed:
            image = TarImage(member.name, target)
            yield Member(name, target, split[0] if split else name, image=image)
        elif target is None:
            not_taken[DEAD_LINK] += 1
        elif side:
            whole = split_image(side[0])
            yield Member(name, target, whole[0] if whole else side[0], side[1], side[0])
        else:
            not_taken[kind_of_ending(name)] += 1


def _is_file(member: tarfile.TarInfo) -> bool:
    return member.isreg() or member.type not in tarfile.SUPPORTED_TYPES  # as POSIX and tarfile take unknown types


def _follow(
    link: tarfile.TarInfo, links: dict[str, tarfile.TarInfo], files: dict[str, tarfile.TarInfo]
) -> tuple[str, tarfile.TarInfo | None]:
    """Where a symbolic link leads within the tar, and the file there; None if it leads to none, or out of the tar."""
    path = normpath(link.name)
    for _ in range(MAX_LINKS):
        path = normpath(f"{dirname(path)}/{link.linkname}".lstrip("/") if link.linkname[:1] != "/" else link.linkname)
        if path in files or path not in links:
            break
        link = links[path]
    return path, files.get(path)


def _pair(group: list[Member], not_taken: Counter[str]) -> None:
    """Give the side files of a sample to its images."""
    images = {member.name: member.image for member in group if member.image is not None}
    shared: dict[str, tarfile.TarInfo] = {}
    for member in group:
        if member.image is not None:
            continue
        assert member.target is not None  # dead links were left out
        beside = images[member.stem].beside if member.stem in images else shared
        if not images or not (beside is not shared or member.stem == member.key):
            not_taken[LONE_SIDE_FILE] += 1
        elif member.side_ending in beside:
            not_taken[SECOND_SIDE_FILE] += 1
        else:
            beside[member.side_ending] = member.target
    for image in images.values():
        not_taken[SECOND_SIDE_FILE] += len(image.beside.keys() & shared.keys())
        image.beside = shared | image.beside


def _split(sample: list[tuple[int, Member]]) -> list[list[Member]] | None:
    """Split members of one key, among which a name comes twice, into the samples that they were. None: it is not certain.

    Neighbours are one sample, until a name comes again. Samples next to each other must be of the same names, or else one of
    them lacks something, and nobody can say which. Side files without an image show too that it was not so.
    """
    groups: list[list[Member]] = []
    for _, run in groupby(sample, key=lambda entry: entry[0]):
        forms: set[frozenset[str]] = set()
        names: set[str] = set()
        groups.append([])
        for _, member in run:
            if member.name in names:
                forms.add(frozenset(names))
                names = set()
                groups.append([])
            names.add(member.name)
            groups[-1].append(member)
        if len(forms | {frozenset(names)}) > 1:
            return None
    return None if any(all(member.image is None for member in group) for group in groups) else groups
