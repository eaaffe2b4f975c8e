"""Commands start at once: no command loads a heavy library before its work begins. Counted in modules, not in seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.benchmark.config import StartupConfig
from jobs.benchmark.startup import benchmark_startup, make_small_dataset

HEAVY = ("torch", "ray", "mlflow", "transformers", "matplotlib", "diffusers", "deepspeed", "sklearn", "scipy")
RUN = f"""
import contextlib, importlib, io, sys
from jobs.common.commands import COMMANDS

def answer(name, *arguments):
    inside = {{"demo": "demo.main", "benchmark": "benchmark.__main__", "paper": "paper.__main__"}}
    module = importlib.import_module("jobs." + inside.get(name, name))
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            code = module.main(list(arguments))
        except SystemExit as exit:
            code = exit.code or 0
    assert not code, (name, arguments, code)
    loaded = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not loaded, f"{{name}} {{' '.join(arguments)}} loads {{loaded}}"
    return module, shown.getvalue()

for name, line in COMMANDS.items():
    module, shown = answer(name, "--help")
    assert " ".join(line.split()) in " ".join(shown.split()), (name, shown[:500])
    for part in getattr(module, "PARTS", ()):
        answer(name, part, "--help")
answer("plan", "--images", "1000", "--print_config")
answer("train", "--config", "jobs/configs/train.yaml", "--dataset_uri", "data", "--print_config")
assert "captions/example" in answer("status", "--dataset_uri", sys.argv[1])[1]
"""


def test_no_command_loads_a_heavy_library_before_its_work_begins(tmp_path: Path) -> None:
    make_small_dataset(str(tmp_path))
    run = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_benchmark_prints_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_startup(StartupConfig(commands=["status", "plan"], repeats=1))
    rows = {line.rpartition("  ")[0].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert {"status --help", "plan --help", "status of a dataset"} <= rows.keys()
    assert float(rows["plan --help"]) > 0


def test_a_python_without_the_project_s_packages_says_how_to_get_them() -> None:
    run = subprocess.run([sys.executable, "-S", "-m", "jobs.draw", "a star"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "run `make install` once" in run.stderr and "Traceback" not in run.stderr
