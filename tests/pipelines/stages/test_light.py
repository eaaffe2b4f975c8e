"""Of a stage only its actors load a model's libraries: its driver, and the tasks that read and write shards, do without."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
LOAD = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = {"torch", "transformers", "diffusers", "sklearn", "scipy"} & sys.modules.keys()
    assert not loaded, f"{name} loads {loaded}"
"""


def test_modules_of_stages_load_no_library_of_models() -> None:
    """Their functions that read shards are what Ray's tasks load: there it cost 8 s and half a GB for each process."""
    files = [file for file in (ROOT / "pipelines").rglob("*.py") if "stages" not in file.parts]
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted(files)
        if re.search(r"\brun_(shards|stream)\b", file.read_text())
    ]
    assert {"pipelines.caption.run", "pipelines.score.captions", "pipelines.extract.run"} <= set(modules)
    run = subprocess.run([sys.executable, "-c", LOAD, *modules], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
