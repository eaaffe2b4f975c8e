"""CI on a slow machine: with which file pytest begins, and when it begins no other test; the scripts of CI and GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_commit_begins_with_another_file_and_what_gets_no_time_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    for name in "abc":
        (tmp_path / f"test_{name}.py").write_text("def test_first(): pass\n\ndef test_second(): pass\n")
    (tmp_path / "test_0.py").write_text("def test_not_asked_for(): pass\n")
    options = ["-ra", "-k", "first or second", "--begin-with", "301", "--until", "0", "--rootdir", str(tmp_path)]
    run = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, check=True)
    skipped = [line.split("no time is left for ")[1] for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped == [f"test_{name}.py::test_{number}" for name in "bca" for number in ("first", "second")]


def test_the_scripts_that_no_test_runs_are_shell() -> None:
    for script in (".ci/run", ".ci/vllm", "infra/gpu/carry.sh", "infra/gpu/run.sh"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
        assert os.access(ROOT / script, os.X_OK)
