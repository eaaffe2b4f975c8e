"""The rule of imports: `jobs -> pipelines -> sana_model`, never back, and inside each the rooms in one order.

Every import statement of every file counts, those inside functions too. `EXCEPTIONS` names the few that may break the rule.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sana_model", "pipelines", "jobs")

ROOMS = (
    "sana_model/arguments",
    "sana_model/pixels",
    "sana_model/memory",
    "sana_model/kernels",
    "sana_model/nn",
    "sana_model/zoo",
    "sana_model/flow",
    "sana_model/solver",
    "sana_model/guidance",
    "sana_model/files",
    "sana_model/offload",
    "sana_model/pictures",
    "sana_model/drawing",
    "sana_model/controls",
    "sana_model/pipeline",
    "sana_model/previews",
    "sana_model/comfyui",
    "sana_model",
    "pipelines/storage",
    "pipelines/tables",
    "pipelines/shapes",
    "pipelines/tracking",
    "pipelines/workers",
    "pipelines/stages",
    "pipelines/ingest",
    "pipelines/caption",
    "pipelines/score",
    "pipelines/extract",
    "pipelines/train/stream",
    "pipelines/train/engine",
    "pipelines/train/loop",
    "pipelines/train",
    "pipelines/train/preflight",
    "pipelines/train_autoencoder",
    "pipelines/draw",
    "pipelines/evaluate",
    "pipelines/serve",
    "pipelines/reports",
    "pipelines/audit",
    "pipelines/zoo",
    "jobs/common",
    "jobs",
)
"""Ground first: a file imports from its own room and from those before it."""

EXCEPTIONS = {
    # Users expect `SanaTransformer.from_pretrained(...)`, as in transformers and diffusers: lazy imports in these methods.
    ("sana_model/nn", "sana_model/files"),
    # `--on_stale rebuild` is a promise of every stage's job; deleting a table needs to know what is made from it.
    ("jobs/common", "pipelines/audit"),
}
"""(importing room, imported room) pairs that may break the order."""

FORBIDDEN = {
    "sana_model": {"ray", "mlflow", "pyarrow"},
    "pipelines/storage": {"torch", "PIL", "transformers"},
    "pipelines/tables": {"torch", "PIL", "transformers"},
    "pipelines/stages": {"torch", "PIL", "transformers"},
}
"""Libraries that the files of a folder must not import."""


def room_of(path: str) -> str:
    """The room of a file or dotted module, written with slashes: the longest entry of ROOMS that it begins with."""
    rooms = [room for room in ROOMS if path == room or path.startswith(f"{room}/")]
    return max(rooms, key=len, default="")


def imports_of(source: str) -> Iterator[str]:
    """Every module (or name of a module) that a file imports, at its top or inside functions, written with slashes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.replace(".", "/") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}".replace(".", "/") for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What a file imports against the rule. `path` is relative to the repository."""
    found, own = [], room_of(path.removesuffix(".py").removesuffix("/__init__"))
    for target in imports_of(source):
        package, room = target.partition("/")[0], room_of(target)
        if any(path.startswith(f"{folder}/") and package in libraries for folder, libraries in FORBIDDEN.items()):
            found.append(f"{path} imports {package}")
        if package in PACKAGES and (own, room) not in EXCEPTIONS and not may_import(own, room):
            found.append(f"{path} ({own}) imports {target} ({room})")
    return found


def may_import(own: str, other: str) -> bool:
    return own in ROOMS and other in ROOMS and ROOMS.index(other) <= ROOMS.index(own)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_imports_only_from_its_own_room_and_those_before_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    found = [line for file in files for line in violations(file.relative_to(ROOT).as_posix(), file.read_text())]
    assert not found, "\n".join(found)


def test_every_folder_with_code_is_a_room() -> None:
    folders = {file.parent.relative_to(ROOT).as_posix() for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert {folder for folder in folders if room_of(folder) in ("", "pipelines")} == {"pipelines"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipelines/storage/files.py", "from pipelines.tables.table import Table"),
        ("pipelines/tables/table.py", "def late():\n    from pipelines.caption import run"),
        ("pipelines/train/stream/noise.py", "import pipelines.train.worker"),
        ("pipelines/caption/run.py", "if True:\n    from jobs.common.config import to_dict"),
        ("sana_model/flow.py", "from pipelines.tables.schema import Row"),
        ("sana_model/nn/transformer.py", "from sana_model.pipeline import TextToImage"),
        ("sana_model/solver.py", "def late():\n    import ray"),
        ("pipelines/stages/shards.py", "import torch.nn"),
        ("jobs/common/job.py", "from jobs.train import run"),
    ],
)
def test_a_planted_import_is_found(path: str, source: str) -> None:
    assert violations(path, source)


def test_imports_down_the_order_are_allowed() -> None:
    assert not violations("pipelines/caption/run.py", "from pipelines.tables.table import Table\nimport sana_model.flow, torch")
    assert not violations("jobs/caption.py", "from pipelines.caption.run import run_caption")
