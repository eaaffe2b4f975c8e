"""A job's configuration: a dataclass, filled from YAML files and dotted command-line overrides, in this order."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from jobs.common.config_faults import check_command_line, check_numbers, check_required, check_sizes, name_section
from jobs.common.config_fields import OFTEN_SECRET, required_fields
from jobs.common.config_values import ConfigFault, rewrite_arguments
from jobs.common.pipes import outlive_readers
from jobs.common.yaml_text import check_yaml
from sana_model.files.redact import redact, redact_values, secrets_in

T = TypeVar("T")
EPILOG = "Where a text says None, type null, in YAML and on the command line."


def parse_config(config_class: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """The configuration that the command line describes: `--config file.yaml --part.field value`.

    `--print_config` shows the result. An unknown key or a bad value ends the program with one line (exit code 2), and so do a
    value without a name, and an override before `--config`, which the file would otherwise undo without a word.
    """
    outlive_readers()
    flags = [f"--{field.name}" for field in fields(config_class) if field.type in (bool, "bool")]  # type: ignore[arg-type]
    arguments = _spell_out(list(sys.argv[1:] if argv is None else argv), flags)
    parser = _make_parser(config_class, prog, description)
    try:
        _check_order(arguments)
        if unnamed := _find_unnamed(arguments):
            raise ValueError(_explain_unnamed(config_class, parser, arguments, unnamed))
        parsed = _parse(parser, config_class, arguments)
        check_required(config_class, parsed.get)
        try:
            values = vars(parser.instantiate(parsed))
            config = config_class(**{name: value for name, value in values.items() if name != "config"})
        except ValueError as error:
            raise ValueError(name_section(config_class, parsed, error)) from error
        check_numbers(config)
        return config
    except (ArgumentError, ValueError) as error:
        print(f"error: {redact(_one_line(error, parser))}", f"({prog} --help explains every setting)", file=sys.stderr)
        sys.exit(2)


def _trust_nothing(config_class: type) -> None:
    """A YAML file may be a stranger's: jsonargparse imports and calls nothing that a value names, and unfolds no small file
    into a huge configuration. (It names our own configurations itself, where a section may be absent, or stands in a list.)"""
    main = [f"__main__.{name}" for name, value in vars(sys.modules["__main__"]).items() if is_dataclass(value)]
    module = [config_class.__module__] if config_class.__module__ != "__main__" else []  # `python -m jobs.x` is __main__
    own = ["jobs", "pipelines", "sana_model", *main, *module]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=own, instantiate_subclass_spec_in_any=False)
    set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


USUAL_LOADER = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    check_yaml(text)
    return USUAL_LOADER(text)


def _make_parser(config_class: type, prog: str, description: str) -> ArgumentParser:
    _trust_nothing(config_class)
    parser = ArgumentParser(prog=prog, description=description, epilog=EPILOG, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file; overrides come after it, such as --part.field value")
    parser.add_class_arguments(config_class, as_group=False)
    needed = [f"--{name} {name.rpartition('.')[2].upper()}" for name in required_fields(config_class)]
    parser.usage = "\n           ".join([f"{prog} [--config FILE.yaml]", *needed, "[--SETTING VALUE ...]"])
    for action in parser._actions:
        if action.help == "Path to a configuration file.":
            action.help = f"a YAML file with the fields of {action.dest} alone"
    return parser


def _parse(parser: ArgumentParser, config_class: type, arguments: list[str]) -> Namespace:
    """What jsonargparse makes of the command line. Where it fails, the error says what is wrong in the user's words."""
    check_sizes(arguments)
    try:
        return parser.parse_args(rewrite_arguments(config_class, arguments))
    except ConfigFault:
        raise
    except (ArgumentError, ValueError, OSError) as error:
        check_command_line(config_class, arguments, parser.prog)
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("a value is nested too deeply") from error


def _one_line(error: Exception, parser: ArgumentParser) -> str:
    """An error's message in one line, with options as a user types them; a single one that is missing is explained."""
    told = " ".join(str(error).split())
    if missing := re.search(r"the following arguments are required: ((?:[\w.]+, )*[\w.]+)", told):
        section = re.match(r'Parser key "([\w.]+)"', told)  # the message of an optional section names its own fields alone
        prefix = f"--{section[1]}." if section else "--"
        names = [prefix + name for name in missing[1].split(", ")]
        texts = {f"--{action.dest}": action.help or "" for action in parser._actions}
        about = f" ({' '.join(texts[names[0]].split())})" if len(names) == 1 and texts.get(names[0]) else ""
        return f"these settings are required: {', '.join(names)}{about}"
    return told.split(" Given value type:")[0]


def _spell_out(arguments: list[str], flags: list[str]) -> list[str]:
    """`--flag` alone as `--flag true`, which is how jsonargparse wants it."""
    spelled = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        spelled.append(argument)
        if argument in flags and following.startswith("-"):
            spelled.append("true")
    return spelled


def _check_order(arguments: list[str]) -> None:
    """Raise ValueError for an override before `--config`."""
    early = [argument for argument in arguments[: _last_config(arguments)] if argument.startswith("--")]
    early = [argument for argument in early if argument.split("=")[0] not in ("--config", "--print_config")]
    if early:
        raise ValueError(f"{early[0]} stands before --config, which would undo it: put --config first")


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


def _explain_unnamed(config_class: type, parser: ArgumentParser, arguments: list[str], unnamed: str) -> str:
    """The message on a value without a name: the required settings that it may be, with what each is."""
    given = {argument.split("=")[0] for argument in arguments}
    texts = {action.dest: action.help or "" for action in parser._actions}
    proposals = []
    for name in required_fields(config_class):
        if f"--{name}" not in given:
            text = re.split(r"[.,;:]", re.sub(r" ?\([^)]*\)", "", texts.get(name, "")))[0]
            proposals.append(f"{parser.prog} --{name} {unnamed}" + (f" ({' '.join(text.split())})" if text else ""))
    if proposals:
        return f"{unnamed!r} needs a name before it, such as: {' or '.join(proposals)}"
    return f"{unnamed!r} needs the name of a setting before it; a value of several words needs quotes, a list is [a, b]"


def _last_config(arguments: list[str]) -> int:
    places = [index for index, argument in enumerate(arguments) if argument.split("=")[0] == "--config"]
    return places[-1] if places else 0


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that `to_dict` was called with, from its result. Raises ValueError with the key that does not fit."""
    _trust_nothing(config_class)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, as_group=False)
    try:
        return config_class(**vars(parser.instantiate(parser.parse_object(dict(values)))))
    except ArgumentError as error:
        raise ValueError(f"this is no {config_class.__name__}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and values, for YAML, MLflow and pages. Secrets are hidden."""
    return redact_values(_plain(asdict(config)), wholly=OFTEN_SECRET)


def secrets_of(config: Any) -> set[str]:
    """Passwords and keys in a configuration, as far as its names and URIs tell."""
    return secrets_in(_plain(asdict(config)), wholly=OFTEN_SECRET)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
