"""Every command that a README shows is one that its program takes."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.common.config import parse_config

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "jobs/README.md", "infra/README.md", "sana_model/README.md", "sana_model/zoo/README.md")
MODULES = {"demo": "jobs.demo.main", "benchmark": "jobs.benchmark.__main__", "paper": "jobs.paper.__main__"}


def shown(readme: str) -> Iterator[list[str]]:
    """Name and arguments of each `python -m jobs.<name> ...` in the README's blocks of commands."""
    text = (ROOT / readme).read_text().replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in re.findall(r"python -m jobs\.(\w.*)", block):
            yield shlex.split(line, comments=True)


COMMANDS = [(readme, command) for readme in READMES for command in shown(readme)]


@pytest.mark.parametrize(("readme", "command"), COMMANDS, ids=[f"{readme}: {command[0]}" for readme, command in COMMANDS])
def test_a_command_of_a_readme_is_taken(readme: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = command
    module = importlib.import_module(MODULES.get(name, f"jobs.{name}"))
    monkeypatch.chdir(ROOT)

    def parse(config_class: type[Any], run: object, argv: Any, **_: object) -> int:
        parse_config(config_class, argv, prog=name, description="")  # as `main` spelled them out
        return 0

    def parse_part(name: str, parts: Any, argv: object) -> int:
        parse_config(parts[arguments[0]].config_class, arguments[1:], prog=name, description="")
        return 0

    for function, stand_in in {"run_job": parse, "run_command": parse, "run_subcommand": parse_part}.items():
        if hasattr(module, function):
            monkeypatch.setattr(module, function, stand_in)
    assert module.main(arguments) == 0


def test_every_readme_is_read() -> None:
    assert {readme for readme, _ in COMMANDS} >= set(READMES) - {"sana_model/README.md"}
