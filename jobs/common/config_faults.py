"""Finds what is wrong with a command line or YAML file that cannot be parsed, and says it in the user's words, in one line."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from jobs.common.config_fields import (
    MOVED,
    OFTEN_SECRET,
    describe,
    field_types,
    fits,
    load,
    members,
    required_fields,
    section_of,
    short,
    suggest,
)
from jobs.common.config_values import ConfigFault, is_blank, read_mapping, takes_whole_numbers, whole_number
from jobs.common.yaml_text import OversizedYAMLError, check_yaml
from pipelines.storage.home import expand_home
from sana_model.files.redact import HIDDEN, is_secret_name

NO_FIELDS = ("config", "print_config", "help")
ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)(.*)", re.DOTALL)


def check_command_line(config_class: type, arguments: Sequence[str], prog: str) -> None:
    """Raise ConfigFault for the first file or option that does not fit the configuration. It sees only what users get wrong."""
    for name, value in _options(arguments):
        if name == "config":
            _check_file(config_class, value, prog)
        elif name not in NO_FIELDS and not name.endswith(".help"):
            _check_option(config_class, name, value)


def check_sizes(arguments: Sequence[str]) -> None:
    """Raise ConfigFault for a value on the command line that unfolds into too much."""
    for name, value in _options(arguments):
        try:
            check_yaml(value or "")
        except OversizedYAMLError as error:
            raise ConfigFault(f"--{name}: {error}") from error
        except yaml.YAMLError:
            continue  # it may be a text


def check_required(config_class: type, value_of: Callable[[str], Any]) -> None:
    """Raise ConfigFault for a required text that is empty, or a URI with one slash, which would name a local folder."""
    for name in required_fields(config_class):
        value = value_of(name)
        if value == "":
            raise ConfigFault(f"--{name} is empty: an unset variable?")
        if isinstance(value, str) and (slip := ONE_SLASH.match(value)):
            scheme, rest = slip.groups()
            raise ConfigFault(
                f"--{name} {value} has one slash after {scheme}: and would be a local folder: write {scheme}://{rest}"
            )


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each option's name and its value, None if there is none."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            following = arguments[place + 1] if place + 1 < len(arguments) else None
            yield name.rstrip("+"), value if equals else None if following is None or following.startswith("--") else following


def _check_option(config_class: type, name: str, value: str | None) -> None:
    hint: Any = config_class
    for part in name.split("."):
        section = section_of(hint)
        if get_origin(hint) is dict or hint is dict:
            return
        hints = field_types(section) if section else {}
        if part not in hints:
            if name in MOVED:
                raise ConfigFault(f"there is no setting --{name} any more: leave it out; {MOVED[name]}")
            close = suggest(config_class, name)
            hint_text = (
                "did you mean " + " or ".join(f"--{known}" for known in close) + "?" if close else "see the names in --help"
            )
            raise ConfigFault(f"there is no setting --{name}: {hint_text}")
        hint = hints[part]
    if value is None:
        raise ConfigFault(f"--{name} needs a value: {describe(hint)}")
    value = expand_home(value)
    if takes_whole_numbers(hint) and whole_number(value) is not None:
        return
    if section_of(hint) and load(value) is not None:
        _check_section_text(hint, name, value)
    elif not fits(hint, value) and not (get_origin(hint) is list and section_of(get_args(hint)[0])):
        raise ConfigFault(f"--{name} takes {describe(hint)}, not {_shown(name, value)}")


def _check_section_text(hint: Any, name: str, value: str) -> None:
    """Check a whole section on the command line: YAML such as {a: 1}, or a file that holds it."""
    section = section_of(hint)
    assert section
    if isinstance(content := load(value), dict):
        _check_mapping(section, content, f"--{name}", f"{name}.", section)
    elif not Path(value).is_file():
        raise ConfigFault(f"--{name} takes {describe(hint)}, or a YAML file with them; there is no file {_shown(name, value)}")
    else:
        _check_mapping(section, read_mapping(value), value, f"{name}.", section)


def _check_file(config_class: type, value: str | None, prog: str) -> None:
    if not value:
        raise ConfigFault("--config needs the name of a YAML file" + (", not '': an unset variable?" if value == "" else ""))
    value = expand_home(value)
    content = load(value)
    if isinstance(content, dict) and not Path(value).exists():
        return _check_mapping(config_class, content, "--config", "", config_class)
    content = read_mapping(value)
    for key, inner in content.items():
        if key not in field_types(config_class) and not suggest(config_class, str(key)):
            kind = "section" if isinstance(inner, dict) else "field"
            takes = ", ".join(field_types(config_class))
            raise ConfigFault(
                f"{value} has a {kind} {str(key)!r} that {prog.removeprefix('python -m ')} does not take: it takes {takes}"
            )
    return _check_mapping(config_class, content, value, "", config_class)


def _check_mapping(section: type, content: dict[Any, Any], origin: str, prefix: str, root: type) -> None:
    """Check the fields of a section in a file. `origin` names the file; `prefix` is the section's dotted name and a dot."""
    hints = field_types(section)
    for key, value in content.items():
        name = f"{prefix}{key}"
        if "." in str(key) or key == "class_path":
            continue
        if key not in hints:
            if name in MOVED:
                raise ConfigFault(f"{origin}: there is no field {name} any more: leave it out; {MOVED[name]}")
            known = [f"{prefix}{near}" for near in suggest(section, str(key))] or suggest(root, name)
            hint_text = f"did you mean {' or '.join(known)}?" if known else f"the fields are {', '.join(hints)}"
            raise ConfigFault(f"{origin}: there is no field {name}: {hint_text}")
        _check_value(hints[key], value, origin, name, root)


def _check_value(hint: Any, value: Any, origin: str, name: str, root: type) -> None:
    inner = section_of(hint)
    if inner and isinstance(value, dict):
        return _check_mapping(inner, value, origin, f"{name}.", root)
    if inner and isinstance(value, str) and Path(origin).parent.joinpath(value).is_file():
        return None
    if is_blank(hint, value) or (takes_whole_numbers(hint) and whole_number(value) is not None):
        return None
    if not fits(hint, value):
        quote = (
            f" (write it in quotes: '{_shown(name, value)}')" if hint is str and isinstance(value, (bool, int, float)) else ""
        )
        raise ConfigFault(f"{origin}: {name} takes {describe(hint)}, not {_shown(name, value)}{quote}")
    if get_origin(hint) is list and (element := section_of(get_args(hint)[0])) and isinstance(value, list):
        for place, each in enumerate(value):
            _check_value(element, each, origin, f"{name}[{place}]", root)
    return None


def check_numbers(config: Any, prefix: str = "--") -> None:
    """Raise ConfigFault for a number of a configuration that is NaN, which no setting means."""
    for field in fields(config):
        value = getattr(config, field.name)
        several = isinstance(value, (list, tuple))
        for place, each in enumerate(value if several else [value]):
            name = f"{prefix}{field.name}" + (f"[{place}]" if several else "")
            if isinstance(each, float) and math.isnan(each):
                raise ConfigFault(f"{name} takes a number, not NaN")
            if is_dataclass(each):
                check_numbers(each, f"{name}.")


def name_section(root: type, values: Any, error: ValueError) -> str:
    """Return the message of an error, with the name of the section whose dataclass raised it.

    Args:
        values: of the whole configuration, as the parser holds them.
    """
    while "Union subtypes" in str(error) and isinstance(inner := error.__cause__ or error.__context__, ValueError):
        error = inner  # what jsonargparse says of a section that may be absent hides what its dataclass said
    message, trace, refused = str(error), error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "__post_init__":
            refused = trace.tb_frame.f_locals["self"]
        trace = trace.tb_next
    places = [place for place, section, given in _sections(root, values) if section is type(refused) and _agree(refused, given)]
    if len(places) != 1:
        return message
    if message.partition("=")[0].rpartition(" ")[2] in field_types(type(refused)) and " " not in message.partition("=")[0]:
        return f"{places[0]}.{message}"
    return f"{places[0]}: {message}"


def _sections(section: type, values: Any, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """Dotted name, class and values of each section in a section, at any depth; those of lists have a place: name[0]."""
    for name, hint in field_types(section).items():
        given, inner = values.get(name), section_of(hint)
        lists = (get_args(member) for member in members(hint) if get_origin(member) in (list, tuple))
        element = next((found for arguments in lists if arguments and (found := section_of(arguments[0]))), None)
        parts = [(f"{prefix}{name}", inner, given)] if inner else []
        if element and isinstance(given, (list, tuple)):
            parts = [(f"{prefix}{name}[{place}]", element, each) for place, each in enumerate(given)]
        for place, kind, each in parts:
            if hasattr(each, "get"):
                yield place, kind, each
                yield from _sections(kind, each, f"{place}.")


def _agree(section: Any, values: Any) -> bool:
    """Whether a section's object was made of these values, as far as its texts and numbers say."""
    simple = (str, int, float, bool)
    return all(values.get(name) == value for name, value in vars(section).items() if isinstance(value, simple))


def _shown(name: str, value: Any) -> str:
    """A setting's value, hidden if it may be a password."""
    parts = name.split(".")
    return HIDDEN if is_secret_name(parts[-1]) or {*parts} & {*OFTEN_SECRET} else short(value)
