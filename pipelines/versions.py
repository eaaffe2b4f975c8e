"""The software that a table is made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("sana-on-ray", "ray", "torch", "transformers", "diffusers", "deepspeed", "vllm", "pyarrow", "pillow")


def software_versions() -> dict[str, str]:
    """Python's, and those of the packages that are installed of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
