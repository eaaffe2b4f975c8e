"""Command lines: files, overrides, and one clear line for what is wrong."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.common.config import parse_config, to_dict
from pipelines.stages.contract import Resources


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings.

    Args:
        scale: of something.
    """

    scale: float = 1.0
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be positive")


@dataclass(frozen=True, kw_only=True)
class Optional:
    """Settings with a section that may be absent.

    Args:
        maybe: the section.
    """

    maybe: Inner | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer settings.

    Args:
        name: of it.
        inner: the rest.
        many: more of them.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    many: list[Inner] = field(default_factory=list)


def parse(*arguments: str) -> Outer:
    return parse_config(Outer, arguments, prog="test", description="A test.")


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("name: file\ninner: {scale: 2.0, resources: {num_cpus: 3}}\nmany: [{scale: 4.0}]\n")
    return str(path)


def test_overrides_come_after_the_file(config_file: str) -> None:
    assert parse("--config", config_file, "--inner.scale", "5") == Outer(
        name="file", inner=Inner(scale=5.0, resources=Resources(num_cpus=3)), many=[Inner(scale=4.0)]
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(*arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_an_override_before_the_file_is_refused(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--inner.scale stands before --config" in refused(capsys, "--inner.scale", "5", "--config", config_file)
    assert "--name=x stands before --config" in refused(capsys, "--name=x", f"--config={config_file}")


def test_unknown_keys_and_bad_values_are_named(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "inner.scal" in refused(capsys, "--config", config_file, "--inner.scal", "5")
    assert "five" in refused(capsys, "--config", config_file, "--inner.scale", "five")
    assert "scale=-1.0 must be positive" in refused(capsys, "--config", config_file, "--inner.scale", "-1")
    (tmp_path / "wrong.yaml").write_text("name: x\ninner: {scael: 1}\n")
    assert "scael" in refused(capsys, "--config", str(tmp_path / "wrong.yaml"))
    assert "name" in refused(capsys, "--inner.scale", "2")


def test_a_value_without_a_name_is_answered_with_the_name(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["data"], ["--inner.scale=2", "data"], ["--config", config_file, "data"]):
        told = refused(capsys, *arguments)
        assert "'data' needs a name before it, such as: test --name data" in told and len(told.splitlines()) == 1
    assert parse("--name", "x", "--many", "[]", "--inner.resources.num_gpus=1").inner.resources.num_gpus == 1


def test_an_optional_section_is_refused_in_the_words_of_its_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Optional, ["--maybe.scale", "-1"], prog="test", description="")
    assert capsys.readouterr().err.startswith("error: maybe.scale=-1.0 must be positive (test --help")


def test_print_config_and_help(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--config", config_file, "--print_config")
    assert "scale: 2.0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("--help")
    told = capsys.readouterr().out
    assert "of something" in told and "--inner.resources.num_gpus" in told


def test_to_dict_is_plain() -> None:
    assert to_dict(Outer(name="x", many=[Inner()]))["many"][0]["resources"] == {
        "num_actors": 1,
        "num_cpus": 1.0,
        "num_gpus": 0.0,
        "custom": {},
    }
