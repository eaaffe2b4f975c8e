"""Refuses YAML that would unfold into far more than it is: anchors within anchors, or brackets without end; and what would be
lost in silence: the first of two values of one name.
"""

from typing import Any

import yaml

MOST_VALUES = 100_000  # of a file, when all its aliases are written out
MOST_LEVELS = 100
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class OversizedYAMLError(yaml.YAMLError):
    """It is YAML, and too much."""


def check_yaml(text: str) -> None:
    """Raise OversizedYAMLError if a text has too many values or levels, before anything is made of it.

    Raises other yaml.YAMLErrors if it is no YAML, as which a name that is given twice counts too.
    """
    _check_size(text)
    _check_names(yaml.compose(text, Loader=LOADER))


def _check_names(root: yaml.Node | None) -> None:
    """Raise yaml.MarkedYAMLError if a mapping gives a name twice: YAML's readers take the last one, and tell nobody."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        lines: dict[str, int] = {}
        for name, value in node.value:
            waiting.append(value)
            if not isinstance(name, yaml.ScalarNode):
                continue
            if name.value in lines and name.value != "<<":
                problem = f"{name.value} is given twice, first in line {lines[name.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
            lines[name.value] = name.start_mark.line + 1


def _check_size(text: str) -> None:
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
