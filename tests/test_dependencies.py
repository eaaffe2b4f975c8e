"""pyproject.toml and the imports say the same: what is imported is declared, and what is declared is imported."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("sana_model", "pipelines", "jobs")
INSTALLED = {"cv2": ["opencv-python-headless"]} | packages_distributions()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

LOADED_BY_NAME = {
    "s3fs": "fsspec loads it for s3:// URIs",
    "python-multipart": "starlette reads forms with it",
}
"""Declared, and imported by another library."""

WITH_EXTRAS = {"jobs/benchmark/": "dev", "pipelines/caption/vllm": "vllm", "sana_model/files/opencv": "controls"} | {
    "pipelines/train_autoencoder/perceptual": "lpips",
    "sana_model/kernels/triton_": "triton",
}
"""Files that begin so may import what an extra of pyproject.toml declares."""

OF_COMFYUI = {"comfy", "folder_paths", "latent_preview"}
"""Modules that are there only inside ComfyUI, which is no package: sana_model/comfyui/ alone may import them."""


def declared(*extras: str) -> set[str]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def imported() -> dict[str, set[str]]:
    """Third-party modules (their first names), and the files that import each."""
    found: dict[str, set[str]] = {}
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(file.relative_to(ROOT).as_posix())
    for name in OF_COMFYUI:
        assert all(file.startswith("sana_model/comfyui/") for file in found.pop(name)), name
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names and name not in PACKAGES}


def distributions(module: str) -> set[str]:
    """The packages that install a module."""
    return {canonicalize_name(name) for name in INSTALLED.get(module, [module])}


def test_what_is_imported_is_declared() -> None:
    for module, files in imported().items():
        for file in files:
            extras = [extra for start, extra in WITH_EXTRAS.items() if file.startswith(start)]
            assert distributions(module) & declared(*extras), f"{file} imports {module}, which pyproject.toml does not declare"


def test_what_is_declared_is_imported() -> None:
    used = {name for module in imported() for name in distributions(module)}
    assert declared() - used == LOADED_BY_NAME.keys()
