"""`python -m jobs`: the list of commands, and the run of one by its name."""

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

import jobs.__main__
from jobs.common.commands import COMMANDS
from jobs.zoo import main as zoo

ROOT = Path(__file__).parents[2]


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of `python -m jobs ...`."""
    with pytest.raises(SystemExit) as exit:
        jobs.__main__.main(arguments)
    return (exit.value.code, *capsys.readouterr())


def test_every_command_is_listed_with_its_line_and_none_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        code, listed, _ = ended(capsys, *arguments)
        assert code == 0
        assert all(f"  {name} " in listed and line in listed for name, line in COMMANDS.items())
    modules = {path.stem for path in (ROOT / "jobs").glob("[!_]*.py")}
    packages = {path.parent.name for path in (ROOT / "jobs").glob("*/__main__.py")}
    assert modules | packages == COMMANDS.keys()


def test_the_version_is_the_project_s_also_where_it_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr("importlib.metadata.version", lambda name: {project["name"]: project["version"]}[name])
    assert ended(capsys, "--version")[:2] == (0, f"{project['name']} {project['version']}\n")

    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", not_installed)
    code, told, _ = ended(capsys, "--version")
    assert code == 0 and "without being installed" in told


def test_a_command_runs_by_its_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sana"])
    code, shown, _ = ended(capsys, "plan", "--images", "1_000")
    assert code == 0 and shown.startswith("1,000 images")
    code, shown, _ = ended(capsys, "benchmark", "solver", "--help")
    assert code == 0 and "flow shift" in shown


def test_an_unknown_name_is_answered_with_the_one_that_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = ended(capsys, "ingets")
    assert code == 2 and "did you mean ingest?" in error and len(error.splitlines()) == 1
    code, _, error = ended(capsys, "xyz")
    assert code == 2 and "the names are ingest, embed_images" in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["clpi"], "did you mean clip?"),
        (["clip", "--loop.num_steps", "5", "--config", "x.yaml"], "--loop.num_steps stands before --config"),
        (["clip", "--output_dir", "x", "--loop.num_steps", "five"], "five"),
        (["captioner", "--output_dir", "x", "--kind", "llava"], "give the folder of a CLIP for llava"),
    ],
)
def test_parts_of_a_command_are_parsed_by_the_same_rules(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        zoo(arguments)
    assert told in capsys.readouterr().err


def test_sana_is_python_m_jobs() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sana"].partition(":")
    assert importlib.util.find_spec(module) and getattr(importlib.import_module(module), function) is jobs.__main__.main
