"""The images: the Dockerfile is clean, and the locks hold what pyproject.toml asks for."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from sqlalchemy import make_url

from tests.support.manifests import ROOT

DOCKER = ROOT / "infra/docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BIN = Path(sys.executable).parent


def requirements(lock: str) -> dict[str, list[Requirement]]:
    """What must hold in an image, and the lock that pins it."""
    if lock == "mlflow":
        texts = [line for line in (ROOT / "infra/mlflow/requirements.in").read_text().splitlines() if not line.startswith("#")]
    else:
        texts = PROJECT["dependencies"] + (PROJECT["optional-dependencies"]["vllm"] if lock == "gpu" else [])
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, texts):
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def pins(lock: str) -> dict[str, Version]:
    text = (DOCKER / f"{lock}.lock").read_text()
    pinned = {
        canonicalize_name(name): Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE)
    }
    assert len(re.findall(r"^\S", text, re.MULTILINE)) == len(pinned), "a line of the lock is no pin with hashes"
    return pinned


@pytest.mark.parametrize("lock", ["cpu", "gpu", "mlflow"])
def test_locks_hold_what_the_project_asks_for(lock: str) -> None:
    pinned = pins(lock)
    if lock == "cpu":  # installed before the rest, because its CPU build has an index of its own
        (torch,) = re.findall(r"torch==(\S+)", DOCKERFILE)
        pinned["torch"] = Version(torch)
    for name, asked in requirements(lock).items():
        assert name in pinned, f"{name} is not in {lock}.lock: run infra/docker/lock.sh"
        for requirement in asked:
            assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} in {lock}.lock: run infra/docker/lock.sh"


def test_the_server_has_the_driver_that_its_database_names() -> None:
    """SQLAlchemy 2.1 takes another than it took before, unless the URI names one."""
    (uri,) = re.findall(r"--backend-store-uri=(\S+)", (ROOT / "infra/mlflow/mlflow.yaml").read_text())
    driver = make_url(uri.replace("$(POSTGRES_PASSWORD)", "secret")).get_dialect().driver
    assert {driver, f"{driver}-binary"} & pins("mlflow").keys(), driver


def test_both_images_agree_where_it_matters() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    for name in ("ray", "transformers", "deepspeed", "pyarrow", "mlflow", "safetensors"):
        assert cpu[name] == gpu[name], name
    assert cpu["mlflow"] == pins("mlflow")["mlflow"]
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]
    assert "nvidia-nccl-cu13" in gpu and "vllm" in gpu and gpu["torch"].local is None


def test_the_dockerfile_is_clean() -> None:
    run = subprocess.run([BIN / "hadolint", str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_hadolint_would_see_something(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.replace("USER 1000", "USER root").replace("python:3.11.13-slim-bookworm", "python"))
    run = subprocess.run([BIN / "hadolint", str(wrong)], capture_output=True, text=True)
    assert run.returncode != 0 and "DL3002" in run.stdout and "DL3006" in run.stdout


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert ignored[0] == "*"
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(Path(source).match(pattern) or source.split("/")[0] == pattern for pattern in kept), source


def test_every_target_ends_without_rights() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    for name in ("cpu", "gpu", "mlflow"):
        (stage,) = [stage for stage in stages if re.match(rf"\S+ AS {name}\n", stage)]
        assert stage.strip().endswith("USER 1000")
    assert not re.search(r"(?i)(password|secret|token)\s*=", DOCKERFILE)


@pytest.mark.slow
def test_locks_resolve(tmp_path: Path) -> None:
    """From the package index, with the locks as they are: nothing that they pin has gone or fits no longer."""
    if shutil.which("uv") is None and not (BIN / "uv").exists():
        pytest.skip("uv is not installed")
    for lock in ("cpu", "gpu", "mlflow"):
        shutil.copy(DOCKER / f"{lock}.lock", tmp_path / f"{lock}.lock")  # uv keeps the versions of a file that is there
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    run = subprocess.run([DOCKER / "lock.sh", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for lock in ("cpu", "gpu", "mlflow"):
        assert (tmp_path / f"{lock}.lock").read_text() == (DOCKER / f"{lock}.lock").read_text(), lock
