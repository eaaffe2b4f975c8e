"""Where the checkpoints of a training lie, and how they are addressed. Without torch."""

import re

from pipelines.storage.files import list_folder

CHECKPOINTS_DIR = "checkpoints"
"""Folder of the checkpoints, in the output folder of a training."""
BEST = "best"
"""The name by which the best checkpoint is addressed, in place of `step-...`."""


def checkpoint_uri(root_uri: str, step: int) -> str:
    return f"{root_uri}/step-{step:06d}"


def list_checkpoints(root_uri: str) -> list[str]:
    """Return the URIs of the checkpoints in a folder, newest first, whole or not."""
    steps = [int(name.removeprefix("step-")) for name in list_folder(root_uri) if re.fullmatch(r"step-\d+", name)]
    return [checkpoint_uri(root_uri, step) for step in sorted(steps, reverse=True)]


def is_checkpoint(uri: str) -> bool:
    """Whether an address has the form of a training's checkpoint's."""
    return re.search(rf"/{CHECKPOINTS_DIR}/(step-\d+|{BEST})/?$", uri) is not None
