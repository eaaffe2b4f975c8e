"""The fields of a configuration's dataclasses by their dotted names, and their types in a user's words."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from jobs.common.yaml_text import check_yaml

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
LONGEST_VALUE = 60
SCALARS = (bool, int, float, NoneType, list, dict)
OFTEN_SECRET = ("env", "extra")
"""Settings whose texts may be passwords or keys, whatever their names are."""


def field_types(section: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section)}


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of any other type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def section_of(hint: Any) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    return next((member for member in members(hint) if is_dataclass(member) and isinstance(member, type)), None)


def all_fields(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the type of every field that an option can set, at any depth."""
    for name, hint in field_types(section).items():
        yield prefix + name, hint
        if inner := section_of(hint):
            yield from all_fields(inner, f"{prefix}{name}.")


def required_fields(section: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of the fields that every command line must give."""
    hints = field_types(section)
    for field in fields(section):
        if field.default is MISSING and field.default_factory is MISSING:
            inner = section_of(hints[field.name])
            yield from required_fields(inner, f"{prefix}{field.name}.") if inner else [prefix + field.name]


MOVED = {
    "extract.scorer": "a training says whose scores choose: train.data.clip",
    "extract.min_best_score": "a training says it: train.data.selection.min_best_score",
    "extract.image_filters": "a training says it: train.data.image_filters",
    "embed.scorer": "embed.captioners names whose captions are embedded",
}
"""Settings of before, and where what they said is said now."""


def suggest(section: type, name: str) -> list[str]:
    """The dotted names that a user may have meant by one that is unknown, the most likely first."""
    names = [known for known, _ in all_fields(section)]
    parent, _, end = name.rpartition(".")
    siblings = {known.rpartition(".")[2]: known for known in names if known.rpartition(".")[0] == parent}
    same_end = [known for known in names if known.split(".")[-1] == end]
    close = get_close_matches(end, siblings, n=1, cutoff=0.7)
    return [siblings[near] for near in close] or same_end[:3] or get_close_matches(name, names, n=1, cutoff=0.85)


def describe(hint: Any) -> str:
    """The values that a type takes, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if section := section_of(hint):
        return f"a section with fields such as {', '.join(list(field_types(section))[:3])}"
    if (origin or hint) in (list, tuple):
        return _describe_list(arguments)
    if (origin or hint) is dict:
        return "pairs such as {name: value}"
    return WORDS.get(hint, "another kind of value")


def _describe_list(arguments: tuple[Any, ...]) -> str:
    if arguments and arguments[0] in (int, float):
        kind = "whole numbers" if arguments[0] is int else "numbers"
        exact = len(arguments) if Ellipsis not in arguments and len(arguments) > 1 else 0
        return f"a list of {f'{exact} ' if exact else ''}{kind} such as [1, 2]"
    if arguments and get_origin(arguments[0]) is Literal:
        return f"a list of some of {', '.join(map(str, get_args(arguments[0])))}"
    return "a list of sections" if arguments and section_of(arguments[0]) else "a list such as [a, b]"


def fits(hint: Any, value: Any) -> bool:
    """Whether a type takes a value as YAML or the command line gives it. True for types that this does not know."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(member, value) for member in arguments)
    if hint is str:
        return not isinstance(value, SCALARS)
    if origin is Literal and value in arguments:
        return True
    value = load(value) if isinstance(value, str) else value
    if origin is Literal:
        return value in arguments
    if hint is float:
        return is_number(value)
    if hint in (int, bool, NoneType):
        return type(value) is hint
    if (origin or hint) in (list, tuple):
        element = arguments[0] if arguments else Any
        return isinstance(value, (list, tuple)) and (bool(section_of(element)) or all(fits(element, inner) for inner in value))
    return isinstance(value, dict) if (origin or hint) is dict or section_of(hint) else True


def is_number(value: Any) -> bool:
    """Whether a value is a number, also one such as 1e-4, which YAML takes for text; NaN is none."""
    if isinstance(value, (bool, list, dict)) or value is None:
        return False
    try:
        return not math.isnan(float(value))
    except (TypeError, ValueError):
        return False


def load(text: str) -> Any:
    """The value that a text on the command line stands for; the text itself if it is no YAML."""
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def hint_of(section: type, name: str) -> Any:
    """The type of a field, by its dotted name; None if there is no such field, or nothing is known of its type."""
    hint: Any = section
    for part in name.split("."):
        inner = section_of(hint)
        hint = field_types(inner).get(part) if inner else None
    return hint


def short(value: Any) -> str:
    """A value as YAML has it, cut where it is long."""
    told = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return told if len(told) <= LONGEST_VALUE else told[:LONGEST_VALUE] + "…"
