"""Values as people write them, brought into the form that the parser takes.

What is left blank has its default, a count may be written 1e8 or 100_000_000, and ~ is the home folder.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from jobs.common.config_fields import hint_of, load, members, section_of, short
from jobs.common.yaml_text import OversizedYAMLError, check_yaml
from pipelines.storage.home import expand_home
from pipelines.tables.text import read_text

COUNT = re.compile(r"[+-]?\d[\d_]*(\.\d*)?([eE]\+?\d{1,3})?")


class ConfigFault(ValueError):
    """Names the file, the field, what came, and what is wanted."""


def whole_number(value: Any) -> int | None:
    """The whole number that a value stands for, such as 1e8, "100_000_000" or 64.0; None if it stands for none."""
    if isinstance(value, str) and COUNT.fullmatch(value):
        value = float(value) if set(value.lower()) & set(".e") else int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def takes_whole_numbers(hint: Any) -> bool:
    """Whether a type takes whole numbers, and neither other numbers nor text."""
    kinds = members(hint)
    return int in kinds and float not in kinds and str not in kinds


def is_blank(hint: Any, value: Any) -> bool:
    """Whether a field is left blank that may not be null: this means its default, or all defaults of a section."""
    return value is None and hint is not None and NoneType not in members(hint) and Any not in members(hint)


def rewrite_arguments(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Bring the values of a command line, and of the files that it names, into the form that the parser takes.

    Raises ConfigFault for a file that cannot be read.
    """
    rewritten: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            option = None if equals else name
            rewritten.append(f"--{name}={_rewrite(config_class, name, value)}" if equals else argument)
        else:
            rewritten.append(argument if option is None else _rewrite(config_class, option, argument))
            option = None
    return rewritten


def _rewrite(config_class: type, name: str, text: str) -> str:
    """The text of one option's value; texts, numbers, and what is no value of the option, stay as they are."""
    hint = config_class if name == "config" else hint_of(config_class, name.rstrip("+"))
    if hint is None or not text:
        return text
    if takes_whole_numbers(hint) and (number := whole_number(text)) is not None:
        return str(number)
    file = Path(expand_home(text))
    if section_of(hint) and (_is_file(file) or (name == "config" and not isinstance(load(text), dict))):
        return dump(_normalize(hint, read_mapping(str(file)), file.parent))
    kinds = {get_origin(member) or member for member in members(hint)}
    content, takes_mapping = load(text), dict in kinds or section_of(hint) is not None
    if (isinstance(content, list) and kinds & {list, tuple}) or (isinstance(content, dict) and takes_mapping):
        return dump(_normalize(hint, content, Path()))
    return expand_home(text)


def _normalize(hint: Any, value: Any, folder: Path) -> Any:
    """Bring a value of this type, and all that is in it, into the form that the parser takes.

    Args:
        hint: None: any.
        folder: of the file that it stands in: a section may be the name of another file, which is read too.
    """
    section = section_of(hint)
    if section and isinstance(value, str) and _is_file(file := folder / expand_home(value)):
        value, folder = read_mapping(str(file)), file.parent
    if isinstance(value, dict):
        hints = {key: hint_of(section, str(key)) if section else None for key in value}
        entries = [(key, inner) for key, inner in value.items() if not is_blank(hints[key], inner)]
        return {key: _normalize(hints[key], inner, folder) for key, inner in entries}
    if isinstance(value, list):
        lists = (member for member in members(hint) if get_origin(member) in (list, tuple))
        element = next((get_args(member)[0] for member in lists if get_args(member)), None)
        return [_normalize(element, inner, folder) for inner in value]
    if takes_whole_numbers(hint) and (number := whole_number(value)) is not None:
        return number
    return expand_home(value) if isinstance(value, str) else value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte in it
        return False


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number and a date as text, as the parser of command lines does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Writes every text in quotes, so that it is read as text again, and nothing as an anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def dump(content: Any) -> str:
    """Values as YAML on one line."""
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=True, width=float("inf"), sort_keys=False).strip()


def read_mapping(file: str) -> dict[Any, Any]:
    """Read the mapping that a YAML file holds. Raises ConfigFault if there is no such file, or something else in it."""
    path = Path(file)
    if not path.exists():
        raise ConfigFault(f"there is no file {file}: --config takes a YAML file")
    if path.is_dir():
        raise ConfigFault(f"{file} is a folder: --config takes a YAML file")
    if path.is_char_device() or path.is_block_device():
        raise ConfigFault(f"{file} is a device: --config takes a YAML file")
    try:
        text = read_text(file)
        check_yaml(text)
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigFault(f"{file} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigFault(f"{file}{where}: this is no YAML: {error.problem or error.context}") from error
    except OversizedYAMLError as error:
        raise ConfigFault(f"{file} holds too much: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigFault(f"{file} is no YAML file: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ConfigFault(str(error)) from error
    if content is None:
        raise ConfigFault(f"{file} is empty: it must hold fields such as dataset_uri: data/cats")
    if not isinstance(content, dict):
        raise ConfigFault(f"{file} holds {short(content)}, not fields such as dataset_uri: data/cats")
    return content
