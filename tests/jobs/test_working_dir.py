"""What `ray job submit --working-dir .` uploads."""

import zipfile
from pathlib import Path

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
LIMIT = 50 * 2**20
"""Bytes; Ray refuses over 500 MiB, and every node unpacks it for every job."""


def test_only_what_jobs_need_is_uploaded(tmp_path: Path) -> None:
    """By the very function that `ray job submit` calls, with the excludes that it adds."""
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(ROOT), package, include_gitignore=True, include_parent_dir=False, excludes=excludes)
    names = zipfile.ZipFile(package).namelist()
    assert package.stat().st_size < LIMIT
    tops = {name.split("/")[0] for name in names}
    assert {"jobs", "pipelines", "sana_model", "pyproject.toml"} <= tops
    assert not tops & {".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", "infra", "outputs", "tests", "build"}
    assert "jobs/configs/demo.yaml" in names and "sana_model/zoo/pipeline/pipeline.json" in names
