"""A command with several parts, such as `python -m jobs.zoo clip`: each part has its own settings, read as every command's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.common.commands import COMMANDS, choose, program
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.common.job import run_reporting


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """One part of a command.

    Args:
        line: what it does, for the list and for its own --help.
        config_class: its settings.
        run: takes them, and imports what is heavy; returns an exit code if it is not 0.
    """

    line: str
    config_class: type[Any]
    run: Callable[[Any], ExitCode | None]


def run_subcommand(name: str, parts: Mapping[str, Subcommand], argv: Sequence[str] | None) -> int:
    """Parse the command line of `name` and run the part that it names; returns the exit code."""
    prog = program(name)
    chosen, arguments = choose(prog, {COMMANDS[name]: {key: part.line for key, part in parts.items()}}, argv)
    part = parts[chosen]
    config = parse_config(part.config_class, arguments, prog=f"{prog} {chosen}", description=part.line)
    return run_reporting(part.run, config)
