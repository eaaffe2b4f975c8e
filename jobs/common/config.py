"""A job's configuration: a dataclass, filled from YAML files and dotted command-line overrides, in this order."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

T = TypeVar("T")
BOOLEANS = ("true", "false", "yes", "no")


class _Parser(ArgumentParser):
    """Says what is wrong in one line, without the list of all settings."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"error: {message}", f"({self.prog} --help explains every setting)", file=sys.stderr)
        sys.exit(2)


def parse_config(config_class: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """The configuration that the command line describes: `--config file.yaml --part.field value`.

    `--print_config` shows the result. An unknown key or a bad value ends the program with one line (exit code 2), and so do a
    value without a name, and an override before `--config`, which the file would otherwise undo without a word.
    """
    flags = [f"--{field.name}" for field in fields(config_class) if field.type in (bool, "bool")]  # type: ignore[arg-type]
    arguments = _spell_out(list(sys.argv[1:] if argv is None else argv), flags)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file; overrides come after it, such as --part.field value")
    parser.add_class_arguments(config_class, as_group=False)
    early = [argument for argument in arguments[: _last_config(arguments)] if argument.startswith("--")]
    early = [argument for argument in early if argument.split("=")[0] not in ("--config", "--print_config")]
    if early:
        parser.error(f"{early[0]} stands before --config, which would undo it: put --config first")
    if unnamed := _find_unnamed(arguments):
        parser.error(f"{unnamed!r} needs a name before it, such as: {prog} --{fields(config_class)[0].name} {unnamed}")  # type: ignore[arg-type]
    parsed = parser.parse_args(arguments)
    try:
        values = vars(parser.instantiate(parsed))
        return config_class(**{name: value for name, value in values.items() if name != "config"})
    except ValueError as error:
        parser.error(str(error))


def _spell_out(arguments: list[str], flags: list[str]) -> list[str]:
    """`--flag` alone as `--flag true`, which is how jsonargparse wants it."""
    spelled = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        spelled.append(argument)
        if argument in flags and following.lower() not in BOOLEANS:
            spelled.append("true")
    return spelled


def _find_unnamed(arguments: list[str]) -> str | None:
    """The first argument that is neither an option nor the value of one."""
    named = False
    for argument in arguments:
        if argument.startswith("--"):
            named = "=" not in argument and argument not in ("--help", "--print_config")
        elif named or argument == "-h":
            named = False
        else:
            return argument
    return None


def _last_config(arguments: list[str]) -> int:
    places = [index for index, argument in enumerate(arguments) if argument.split("=")[0] == "--config"]
    return places[-1] if places else 0


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that `to_dict` was called with, from its result. Raises ValueError with the key that does not fit."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, as_group=False)
    try:
        return config_class(**vars(parser.instantiate(parser.parse_object(dict(values)))))
    except ArgumentError as error:
        raise ValueError(f"this is no {config_class.__name__}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and values, for YAML and MLflow."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
