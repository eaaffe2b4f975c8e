"""Refuses YAML that would unfold into far more than it is: anchors within anchors, or brackets without end."""

from typing import Any

import yaml

MOST_VALUES = 100_000  # of a file, when all its aliases are written out
MOST_LEVELS = 100
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class OversizedYAMLError(yaml.YAMLError):
    """It is YAML, and too much."""


def check_yaml(text: str) -> None:
    """Raise OversizedYAMLError if a text has too many values or levels, before anything is made of it.

    Raises other yaml.YAMLErrors if it is no YAML.
    """
    sizes: dict[str, int] = {}  # of the nodes with an anchor
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    count = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:  # it stands within itself, or nowhere
                raise OversizedYAMLError(f"the alias *{event.anchor} stands for nothing, or for what holds it, without end")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > MOST_VALUES:
            raise OversizedYAMLError(f"with its aliases written out it has more than {MOST_VALUES} values")
        if len(open_nodes) > MOST_LEVELS:
            raise OversizedYAMLError(f"it is nested more than {MOST_LEVELS} levels deep")
