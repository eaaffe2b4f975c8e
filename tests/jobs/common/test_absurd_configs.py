"""Absurd configurations end within seconds, in one line that says what is too much; passwords in them are not shown."""

from pathlib import Path

import pytest
import yaml

from jobs.caption import CaptionJob
from jobs.common.config import parse_config, to_dict
from jobs.common.ray import RayConfig
from jobs.common.yaml_text import OversizedYAMLError, check_yaml
from pipelines.caption.config import HttpConfig

pytestmark = pytest.mark.timeout(60)
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10)
)
"""Ten nested anchors: 10^10 values."""
TOO_MUCH = {
    "ten nested anchors": LAUGHS,
    "nested lists": "a: " + "[" * 10**6,
    "nested maps": "{a: " * 10**6,
    "nested by indentation": "".join(" " * level + "a:\n" for level in range(2000)),
    "nested dashes": "- " * 10**5,
    "itself": "a: &a [*a]",
    "a million numbers": "a: [" + "1," * 10**6 + "]",
}
ORDINARY = ["a: &a {x: 1}\nb: *a\nc: {<<: *a, y: [1, 2]}", "a: 1", "", "just text", "[1, [2, [3]]]", "- a\n- b: c"]
REQUIRED = ["--dataset_uri", "x", "--captioner.name", "a", "--captioner.model", "b"]


def told_by(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_config(CaptionJob, arguments, prog="caption", description="")
    told = capfd.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1 and len(told) < 500, told
    return told


@pytest.mark.parametrize("content", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_file_that_unfolds_into_too_much_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str) -> None:
    with pytest.raises(yaml.YAMLError):
        check_yaml(content)
    file = tmp_path / "absurd.yaml"
    file.write_text(content)
    assert "absurd.yaml" in told_by(["--config", str(file)], capfd)
    told_by([*REQUIRED, "--captioner", str(file)], capfd)
    told_by([*REQUIRED, "--captioner.http.extra", str(file)], capfd)
    told_by([*REQUIRED, "--captioner.http.extra", content[:100_000]], capfd)


@pytest.mark.parametrize("content", ORDINARY)
def test_ordinary_yaml_is_taken(content: str) -> None:
    check_yaml(content)


def test_aliases_count_as_what_they_stand_for() -> None:
    check_yaml("a: &a [1, 2, 3]\nb: [" + "*a, " * 24_000 + "]")
    with pytest.raises(OversizedYAMLError, match="100000 values"):
        check_yaml("a: &a [1, 2, 3]\nb: [" + "*a, " * 25_100 + "]")


@pytest.mark.parametrize("num_cpus", [0, -1, 10**9])
def test_a_ray_of_a_billion_cpus_is_refused(num_cpus: int) -> None:
    """It would start as many processes."""
    with pytest.raises(ValueError, match=f"num_cpus={num_cpus} must be from 1 to "):
        RayConfig(num_cpus=num_cpus)


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--captioner.http.extra", SECRET],
        ["--captioner.http.extra", f"[{SECRET}]"],
        ["--captioner.vllm.env", SECRET],
        ["--captioner.http.base_url", f"ftp://user:{SECRET}@host/v1"],
        ["--captioner.http.base_url", f"http://user:{SECRET}@host/v1", "--captioner.http.timeout", "0"],
        ["--captioner.http.api_key_variable", f"sk-{SECRET}"],
        ["--captioner.http.concurrency", f"http://user:{SECRET}@host"],
        ["--tracking.uri", f"http://user:{SECRET}@host", "--captioner.batch_size", "0"],
        ["--tracking", f"{{uri: 'http://user:{SECRET}@host', experimnt: x}}"],
        ["--captioner.http", f"{{extra: [{SECRET}]}}"],
        ["--captioner.http", f"{{extra: {{api_key: {SECRET}}}, timeout: never}}"],
        [f"http://user:{SECRET}@host"],
    ],
)
def test_a_command_line_that_is_refused_shows_no_secret(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert SECRET not in told_by([*REQUIRED, *arguments], capfd)


def test_what_runs_and_pages_get_shows_no_secret() -> None:
    http = {"base_url": f"http://user:{SECRET}@host/v1", "extra": {"api_key": SECRET, "mode": SECRET, "top_k": 5}}
    job = parse_config(
        CaptionJob,
        [*REQUIRED, "--captioner.http", yaml.safe_dump(http), "--captioner.vllm.env", f"{{LEVEL: {SECRET}}}"],
        prog="caption",
        description="",
    )
    assert job.captioner.http == HttpConfig(**http) and job.captioner.vllm.env == {"LEVEL": SECRET}
    shown = to_dict(job)
    assert SECRET not in str(shown)
    assert (
        shown["captioner"]["http"]["extra"]["top_k"] == 5
        and shown["captioner"]["http"]["base_url"] == "http://user:***@host/v1"
    )
